/** Series of a run as the charts want them, and how new rounds are added to them. */

import type { RoundItem, Series, SeriesList } from "../api/client";

/** null is a value that is not a number: a gap. undefined is none at all: the line goes on. */
export type Values = (number | null | undefined)[];
export type Axis = "round" | "seconds";

export const PHASES = ["select", "train", "finish", "evaluate", "checkpoint"] as const;

/** The name of a series in addresses: kind/name. */
export function key(series: { kind: string; name: string }): string {
  return `${series.kind}/${series.name}`;
}

/** Seconds that one round took; folding happens inside of training. */
export function roundSeconds(round: RoundItem): number {
  return PHASES.reduce((sum, phase) => sum + (round.seconds[phase] ?? 0), 0);
}

function ofRound(series: Series, round: RoundItem): number | null | undefined {
  if (series.kind !== "round") return round.metrics?.[series.kind][series.name];
  const phase = /^(.*)-seconds$/.exec(series.name)?.[1];
  if (phase) return round.seconds[phase as keyof RoundItem["seconds"]];
  return (round as unknown as Record<string, number | null>)[series.name.replaceAll("-", "_")];
}

/** `list` with the rounds that it does not have yet; the same object when there is none. */
export function extended(list: SeriesList, rounds: readonly RoundItem[]): SeriesList {
  const fresh = rounds.filter((round) => round.round > list.rounds_done);
  if (fresh.length === 0) return list;
  const clockRounds = [...list.clock_rounds];
  const clock = [...list.seconds];
  for (const round of fresh) {
    clockRounds.push(round.round);
    clock.push((clock.at(-1) ?? 0) + roundSeconds(round));
  }
  return {
    ...list,
    rounds_done: fresh.at(-1)?.round ?? list.rounds_done,
    clock_rounds: clockRounds,
    seconds: clock,
    series: list.series.map((series) => withRounds(series, fresh)),
  };
}

function withRounds(series: Series, fresh: readonly RoundItem[]): Series {
  const rounds = [...series.rounds];
  const values = [...series.values];
  for (const round of fresh) {
    const value = ofRound(series, round);
    if (value === undefined) continue;
    rounds.push(round.round);
    values.push(value);
  }
  return { ...series, rounds, values, total: series.total + rounds.length - series.rounds.length };
}

/** Whether the next rounds follow on what `list` has; else it must be loaded again. */
export function follows(list: SeriesList, rounds: readonly RoundItem[]): boolean {
  const first = rounds[0];
  return !first || first.round <= list.rounds_done + 1;
}

/** Several series on one axis of rounds: undefined where one has no value. */
export function aligned(series: readonly { rounds: readonly number[]; values: Values }[]): { x: number[]; columns: Values[] } {
  const x = [...new Set(series.flatMap((one) => one.rounds))].sort((a, b) => a - b);
  const place = new Map(x.map((round, index) => [round, index]));
  const columns = series.map((one) => {
    const column: Values = new Array<number | null | undefined>(x.length).fill(undefined);
    one.rounds.forEach((round, index) => {
      column[place.get(round) ?? 0] = one.values[index];
    });
    return column;
  });
  return { x, columns };
}

/** The seconds of work up to each of `rounds`; between known rounds by proportion. */
export function secondsAt(rounds: readonly number[], clockRounds: readonly number[], clock: Values): number[] {
  const known: [number, number][] = [[0, 0]];
  clockRounds.forEach((round, index) => {
    const value = clock[index];
    if (value != null && round > 0) known.push([round, value]);
  });
  let at = 0;
  return rounds.map((round) => {
    while (at < known.length - 2 && (known[at + 1]?.[0] ?? 0) < round) at += 1;
    const [low, high] = [known[at], known[at + 1]];
    if (!low || !high) return low?.[1] ?? 0;
    return low[1] + ((high[1] - low[1]) * (round - low[0])) / (high[0] - low[0] || 1);
  });
}

/** Each column on top of the ones before it; a missing value counts as nothing. */
export function stacked(columns: readonly Values[]): Values[] {
  const sums: Values[] = [];
  for (const column of columns) {
    const below = sums.at(-1);
    sums.push(column.map((value, index) => (below?.[index] ?? 0) + (value ?? 0)));
  }
  return sums;
}

/** Values that a logarithmic axis can show. */
export function positive(values: Values): Values {
  return values.map((value) => (value === undefined || (value !== null && value > 0) ? value : null));
}

/** The value at `index`, or the last known one when there is no cursor. */
export function valueAt(values: Values, index: number | null): number | null {
  if (index != null) return values[index] ?? null;
  for (let at = values.length - 1; at >= 0; at -= 1) if (values[at] != null) return values[at] ?? null;
  return null;
}
