import type { RunSummary } from "../api/client";

/** The shortest name by which the runs can be told apart: strategy, name, both, or with the id. */
export function runLabels(runs: readonly Pick<RunSummary, "id" | "name" | "strategy" | "seed">[]): Map<string, string> {
  const ways: ((run: (typeof runs)[number]) => string)[] = [
    (run) => run.strategy,
    (run) => run.name,
    (run) => `${run.name} · ${run.strategy}`,
    (run) => `${run.name} · ${run.strategy} · seed ${run.seed}`,
    (run) => `${run.name} · ${run.strategy} · ${run.id}`,
  ];
  const way = ways.find((write) => new Set(runs.map(write)).size === runs.length) ?? ((run) => run.id);
  return new Map(runs.map((run) => [run.id, way(run)]));
}
