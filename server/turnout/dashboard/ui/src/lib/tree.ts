/** Nested settings as lines, and values as text. */

import { plain } from "./format";

/** Every leaf with its keys joined by dots; lists are leaves. */
export function flattened(tree: Record<string, unknown>, prefix = ""): [string, unknown][] {
  return Object.entries(tree).flatMap(([name, value]) => {
    const path = prefix ? `${prefix}.${name}` : name;
    const inner = value !== null && typeof value === "object" && !Array.isArray(value);
    return inner && Object.keys(value).length > 0
      ? flattened(value as Record<string, unknown>, path)
      : [[path, value] as [string, unknown]];
  });
}

export function shown(value: unknown): string {
  if (value === null || value === undefined) return "not set";
  if (typeof value === "string") return value === "" ? '""' : plain(value);
  return plain(JSON.stringify(value));
}

export interface Difference {
  path: string;
  /** One per tree; null where it has no such key. */
  values: (string | null)[];
}

/** The leaves that are not the same in all of `trees`, by path. */
export function differences(trees: readonly Record<string, unknown>[]): Difference[] {
  const maps = trees.map((tree) => new Map(flattened(tree).map(([path, value]) => [path, shown(value)])));
  const paths = [...new Set(maps.flatMap((map) => [...map.keys()]))].sort();
  return paths
    .map((path) => ({ path, values: maps.map((map) => map.get(path) ?? null) }))
    .filter(({ values }) => new Set(values).size > 1);
}
