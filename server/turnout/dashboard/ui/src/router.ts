/** The page's whole state is its query string, so that an address shows the same view to anyone. */

import { useEffect, useState } from "preact/hooks";

export type Changes = Record<string, string | number | null | undefined>;

const listeners = new Set<() => void>();

export function params(): URLSearchParams {
  return new URLSearchParams(location.search);
}

/** The address with `changes` made to `from`; null, undefined and "" take a key away. */
export function address(changes: Changes, from: URLSearchParams = new URLSearchParams()): string {
  const next = new URLSearchParams(from);
  for (const [key, value] of Object.entries(changes)) {
    if (value == null || value === "") next.delete(key);
    else next.set(key, String(value));
  }
  // Commas and colons are harmless in a query and read better.
  return `?${next.toString().replaceAll("%2C", ",").replaceAll("%3A", ":").replaceAll("%2F", "/")}`;
}

export function go(to: string, options: { replace?: boolean } = {}): void {
  if (to === (location.search || "?")) return;
  const url = to === "?" ? location.pathname : to;
  if (options.replace) history.replaceState(null, "", url);
  else history.pushState(null, "", url);
  for (const listener of listeners) listener();
}

/** Changes parts of the current view in place: no new entry in the browser's history. */
export function set(changes: Changes): void {
  go(address(changes, params()), { replace: true });
}

export function useParams(): URLSearchParams {
  const [search, update] = useState(location.search);
  useEffect(() => {
    const listener = () => update(location.search);
    listeners.add(listener);
    addEventListener("popstate", listener);
    listener();
    return () => {
      listeners.delete(listener);
      removeEventListener("popstate", listener);
    };
  }, []);
  return new URLSearchParams(search);
}

/** Follows links of the page without loading it again. */
export function interceptLinks(event: MouseEvent): void {
  if (event.defaultPrevented || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey) return;
  const link = (event.target as Element).closest("a");
  const to = link?.getAttribute("href");
  if (!link || !to?.startsWith("?") || link.target || link.hasAttribute("download")) return;
  event.preventDefault();
  go(to);
  scrollTo(0, 0);
}

/** "3:17" as [3, 17]; null when it is no such pair. */
export function pair(text: string | null): [number, number] | null {
  const found = /^(-?\d+(?:\.\d+)?):(-?\d+(?:\.\d+)?)$/.exec(text ?? "");
  if (!found) return null;
  const [low, high] = [Number(found[1]), Number(found[2])];
  return low < high ? [low, high] : null;
}

export function list(text: string | null): string[] {
  return [...new Set((text ?? "").split(",").filter(Boolean))];
}
