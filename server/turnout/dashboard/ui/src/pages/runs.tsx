/** All runs: what lives, what failed, what came out. */

import { useEffect, useRef, useState } from "preact/hooks";
import type { RunList, RunSummary } from "../api/client";
import { api } from "../api/client";
import { useLoad } from "../api/load";
import { Name, Pending, Select, Status, When } from "../components/parts";
import { Sparkline } from "../components/sparkline";
import { count, metric, plain, plural, seconds } from "../lib/format";
import { useShortcuts } from "../lib/shortcuts";
import { useLive } from "../live";
import { address, go, list, set } from "../router";

const PAGE = 50;
export const MOST_COMPARED = 8;

type Column = [sort: string | null, words: string, numeric?: boolean];
const COLUMNS: Column[] = [
  ["status", "Status"],
  ["name", "Name"],
  ["strategy", "Strategy"],
  ["task", "Task"],
  ["rounds", "Rounds", true],
  ["metric", "Best", true],
  [null, "Curve"],
  ["created", "Started"],
  ["seconds", "Time", true],
];

export function RunsPage({ query }: { query: URLSearchParams }) {
  const sort = query.get("sort") ?? "created";
  const order = query.get("order") ?? "desc";
  const offset = Number(query.get("from") ?? 0);
  const filters = ["status", "strategy", "task", "study"].map((name) => [name, query.get(name)] as const);
  const url = api("runs", { ...Object.fromEntries(filters), q: query.get("q"), sort, order, limit: PAGE, offset });
  const runs = useLoad<RunList>(url, 1_000);
  const [fresh, setFresh] = useState<Map<string, RunSummary>>(new Map());
  useEffect(() => {
    document.title = "Runs · Turnout";
  }, []);
  useEffect(() => setFresh(new Map()), [runs.data]);
  useLive({
    update: ({ runs: changed }) => {
      const shown = new Map(runs.data?.items.map((run) => [run.id, fresh.get(run.id) ?? run]));
      if (changed.some((run) => shown.get(run.id)?.status !== run.status)) runs.reload();
      setFresh((old) => new Map([...old, ...changed.map((run) => [run.id, run] as const)]));
    },
    resync: runs.reload,
  });

  const items = runs.data?.items.map((run) => fresh.get(run.id) ?? run) ?? [];
  const filtered = filters.some(([, value]) => value) || query.get("q");
  const nothing = runs.data?.total === 0;
  return (
    <>
      <h1 tabIndex={-1}>Runs</h1>
      <Filters query={query} runs={runs.data} />
      {runs.error && <Pending error={runs.error} retry={runs.reload} />}
      {!runs.data && !runs.error && <Pending error={null} retry={runs.reload} />}
      {nothing && !filtered && <NoRuns />}
      {nothing && filtered && (
        <p class="empty">
          No run matches. <a href="?">Show all runs.</a>
        </p>
      )}
      {items.length > 0 && <RunTable items={items} query={query} sort={sort} order={order} />}
      {runs.data && runs.data.total > PAGE && <Pages query={query} offset={offset} total={runs.data.total} />}
    </>
  );
}

function Filters({ query, runs }: { query: URLSearchParams; runs: RunList | null }) {
  const field = useRef<HTMLInputElement>(null);
  useShortcuts({ "/": () => field.current?.focus() });
  const facets = (["status", "strategy", "task", "study"] as const).filter(
    (name) => (runs?.facets[name].length ?? 0) > 1 || query.get(name),
  );
  return (
    <div class="filters" role="search">
      <label class="search">
        <span class="hidden">Search runs</span>
        <input
          ref={field}
          type="search"
          placeholder="Search runs   /"
          value={query.get("q") ?? ""}
          onInput={(event) => set({ q: event.currentTarget.value, from: null })}
        />
      </label>
      {facets.map((name) => (
        <Select
          key={name}
          label={name}
          value={query.get(name) ?? ""}
          onChange={(value) => set({ [name]: value, from: null })}
          options={[
            ["", "all"],
            ...(runs?.facets[name] ?? []).map((one) => [one.value, `${one.value} (${count(one.count)})`] as const),
          ]}
        />
      ))}
      {runs && <span class="note">{plural(runs.total, "run")}</span>}
    </div>
  );
}

function NoRuns() {
  return (
    <div class="empty card">
      <h2>No run yet</h2>
      <p>A run appears here as soon as it starts. In the folder where the dashboard looks for runs:</p>
      <pre>
        <code>turnout simulate examples/digits.toml</code>
      </pre>
      <p>
        Or <code>turnout server</code> with clients of your own. <a href="?page=methods">See what you can choose from.</a>
      </p>
    </div>
  );
}

interface TableProps {
  items: RunSummary[];
  query: URLSearchParams;
  sort: string;
  order: string;
}

function RunTable({ items, query, sort, order }: TableProps) {
  const body = useRef<HTMLTableSectionElement>(null);
  const chosen = list(query.get("chosen"));
  const toggle = (id: string) => {
    const next = chosen.includes(id) ? chosen.filter((one) => one !== id) : [...chosen, id].slice(-MOST_COMPARED);
    set({ chosen: next.join(",") });
  };
  const links = () => [...(body.current?.querySelectorAll<HTMLElement>("a.open") ?? [])];
  const current = () => links().findIndex((link) => link.closest("tr")?.contains(document.activeElement));
  const compare = () => chosen.length > 0 && go(address({ page: "compare", runs: chosen.join(",") }));
  useShortcuts({
    j: () => links()[Math.min(current() + 1, items.length - 1)]?.focus(),
    k: () => links()[Math.max(current() - 1, 0)]?.focus(),
    x: () => {
      const run = items[current()];
      if (run) toggle(run.id);
    },
    c: compare,
  });
  return (
    <>
      <div class="chosen" role="status">
        {chosen.length > 0 ? (
          <>
            {plural(chosen.length, "run")} selected
            <a class="button primary" href={address({ page: "compare", runs: chosen.join(",") })}>
              Compare
            </a>
            <button type="button" onClick={() => set({ chosen: null })}>
              Clear
            </button>
          </>
        ) : (
          <span class="note">Select up to {MOST_COMPARED} runs to compare them.</span>
        )}
      </div>
      <div class="scroll card" tabIndex={0} role="region" aria-label="Runs, table">
        <table class="runs">
          <thead>
            <tr>
              <td />
              {COLUMNS.map((column) => (
                <SortHeading key={column[1]} column={column} query={query} sort={sort} order={order} />
              ))}
            </tr>
          </thead>
          <tbody ref={body}>
            {items.map((run) => (
              <RunRow key={run.id} run={run} chosen={chosen.includes(run.id)} toggle={() => toggle(run.id)} />
            ))}
          </tbody>
        </table>
      </div>
    </>
  );
}

function SortHeading(props: { column: Column; query: URLSearchParams; sort: string; order: string }) {
  const [name, words, numeric] = props.column;
  if (!name) return <th scope="col">{words}</th>;
  const active = name === props.sort;
  const next = active && props.order === "desc" ? "asc" : active ? "desc" : name === "created" || numeric ? "desc" : "asc";
  const sorted = props.order === "desc" ? "descending" : "ascending";
  return (
    <th scope="col" class={numeric ? "number" : ""} aria-sort={active ? sorted : undefined}>
      <button type="button" class="sort" onClick={() => set({ sort: name, order: next, from: null })}>
        {words}
        <span aria-hidden="true">{active ? (props.order === "desc" ? " ↓" : " ↑") : ""}</span>
      </button>
    </th>
  );
}

function RunRow({ run, chosen, toggle }: { run: RunSummary; chosen: boolean; toggle: () => void }) {
  const best = run.headline;
  return (
    <tr class={chosen ? "selected" : ""}>
      <td>
        <input type="checkbox" checked={chosen} onChange={toggle} aria-label={`Select run ${run.id} for a comparison`} />
      </td>
      <td>
        <Status status={run.status} />
      </td>
      <td>
        <a class="open" href={address({ page: "run", run: run.id })}>
          <Name text={run.name} />
        </a>
        <span class="id">{run.id}</span>
        {run.error && <span class="error-line"><Name text={run.error} /></span>}
      </td>
      <td>
        <Name text={run.strategy} />
      </td>
      <td>
        <Name text={run.task} />
      </td>
      <td class="number">
        <span class="progress">
          {count(run.rounds_done)} / {count(run.num_rounds)}
          <progress max={run.num_rounds || 1} value={run.rounds_done} aria-label={`Rounds of run ${run.id}`} />
        </span>
      </td>
      <td class="number">
        {best ? (
          <>
            {metric(best.name, best.best)}
            <span class="id">
              {plain(best.name)}, round {count(best.best_round)}
            </span>
          </>
        ) : (
          "–"
        )}
      </td>
      <td>{best && <Sparkline values={best.sparkline} label={`${plain(best.name)} over the rounds`} />}</td>
      <td>
        <When at={run.created_at} />
      </td>
      <td class="number">{seconds(run.seconds)}</td>
    </tr>
  );
}

function Pages({ query, offset, total }: { query: URLSearchParams; offset: number; total: number }) {
  return (
    <nav class="pages" aria-label="Pages of the list">
      {offset > 0 && <a href={address({ from: Math.max(0, offset - PAGE) || null }, query)}>← previous</a>}
      <span>
        {count(offset + 1)}–{count(Math.min(offset + PAGE, total))} of {count(total)}
      </span>
      {offset + PAGE < total && <a href={address({ from: offset + PAGE }, query)}>next →</a>}
    </nav>
  );
}
