import { api } from "./client";

const TABLES = [
  ["rounds", "Rounds"],
  ["metrics", "Metrics"],
  ["clients", "Clients by round"],
] as const;

/** Addresses of a run's tables, as CSV and as JSON. */
export function exports(run: string): { words: string; href: string }[] {
  return TABLES.flatMap(([table, words]) =>
    ["csv", "json"].map((format) => ({
      words: `${words}, ${format.toUpperCase()}`,
      href: api(`runs/${encodeURIComponent(run)}/export/${table}.${format}`),
    })),
  );
}
