/** Which series share a chart, and how their values are written. */

import type { SeriesSummary } from "../api/client";
import type { Num } from "./format";
import { isShare, metric } from "./format";
import { key } from "./series";

/** What the engine counts among the training metrics; the rounds tell it already. */
const COUNTS = /^(participants|failed|rejected|missing|.*-seconds)$/;

export interface Group {
  title: string;
  keys: string[];
  format: (value: Num) => string;
}

/** Held-out and training metrics: shares together, losses together, everything else by name. */
export function metricGroups(series: readonly Pick<SeriesSummary, "kind" | "name">[]): Group[] {
  const groups = new Map<string, Group>();
  for (const one of series) {
    if (one.kind !== "evaluate" && (one.kind !== "train" || COUNTS.test(one.name))) continue;
    const title = isShare(one.name) ? "Accuracy" : /loss/i.test(one.name) ? "Loss" : one.name;
    const group = groups.get(title) ?? { title, keys: [], format: (value: Num) => metric(one.name, value) };
    group.keys.push(key(one));
    groups.set(title, group);
  }
  const rank = (group: Group) => ["Accuracy", "Loss"].indexOf(group.title) + 1 || 3;
  return [...groups.values()].sort((a, b) => rank(a) - rank(b));
}

/** "evaluate/accuracy" as a legend says it. */
export function label(name: string): string {
  const [kind, rest] = [name.slice(0, name.indexOf("/")), name.slice(name.indexOf("/") + 1)];
  if (kind === "evaluate") return `${rest}, held out`;
  return kind === "train" ? (rest.startsWith("train") ? rest : `${rest}, training`) : rest;
}
