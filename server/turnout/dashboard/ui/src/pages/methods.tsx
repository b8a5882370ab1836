/** What an experiment file can name: strategies, local updates and all else that is registered. */

import type { ComponentChildren } from "preact";
import { useEffect } from "preact/hooks";
import type { MethodList } from "../api/client";
import { api } from "../api/client";
import { useLoad } from "../api/load";
import { Pending } from "../components/parts";
import { plain, plural } from "../lib/format";
import { set } from "../router";

/** Kinds in the order in which one chooses; others follow. */
const FIRST = ["strategy", "local-update", "participation", "partitioner", "task"];

/** Text in which ``pieces`` are code, as docstrings have it. */
function withCode(text: string): ComponentChildren[] {
  return plain(text)
    .split("``")
    .map((piece, index) => (index % 2 === 1 ? <code key={index}>{piece}</code> : piece));
}

export function MethodsPage({ query }: { query: URLSearchParams }) {
  const methods = useLoad<MethodList>(api("methods"));
  useEffect(() => {
    document.title = "Methods · Turnout";
  }, []);
  const words = (query.get("q") ?? "").toLowerCase().split(/\s+/).filter(Boolean);
  const kind = query.get("kind") ?? "";
  const shown = (methods.data?.items ?? []).filter((method) => {
    const text = `${method.slug} ${method.kind} ${method.paper ?? ""} ${method.summary}`.toLowerCase();
    return (!kind || method.kind === kind) && words.every((word) => text.includes(word));
  });
  const rank = (one: string) => FIRST.indexOf(one) + 1 || FIRST.length + 1;
  const kinds = [...new Set(shown.map((method) => method.kind))].sort((a, b) => rank(a) - rank(b));
  return (
    <>
      <h1 tabIndex={-1}>Methods</h1>
      <div class="filters" role="search">
        <label class="search">
          <span class="hidden">Search methods</span>
          <input
            type="search"
            placeholder="Search methods"
            value={query.get("q") ?? ""}
            onInput={(event) => set({ q: event.currentTarget.value })}
          />
        </label>
        <label class="select">
          <span>Kind</span>
          <select value={kind} onChange={(event) => set({ kind: event.currentTarget.value })}>
            <option value="">all</option>
            {methods.data?.kinds.map((one) => <option key={one}>{one}</option>)}
          </select>
        </label>
        {methods.data && <span class="note">{plural(shown.length, "method")}</span>}
      </div>
      {!methods.data && <Pending error={methods.error} retry={methods.reload} />}
      {methods.data && shown.length === 0 && <p class="empty">No method matches.</p>}
      {kinds.map((one) => (
        <section key={one} class="card" aria-labelledby={`kind-${one}`}>
          <header>
            <h2 id={`kind-${one}`}>{one}</h2>
          </header>
          <ul class="methods">
            {shown
              .filter((method) => method.kind === one)
              .map((method) => (
                <li key={method.slug}>
                  <code>{method.slug}</code>
                  <span>{withCode(method.summary)}</span>
                  {method.url && (
                    <a href={method.url} target="_blank" rel="noopener noreferrer">
                      {method.paper ? `arXiv ${method.paper}` : "paper"}
                      <span class="hidden"> (opens a new tab)</span>
                    </a>
                  )}
                </li>
              ))}
          </ul>
        </section>
      ))}
    </>
  );
}
