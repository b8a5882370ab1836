import { describe, expect, it } from "vitest";
import type { RoundItem, SeriesList } from "../src/api/client";
import { metricGroups } from "../src/lib/groups";
import { aligned, extended, follows, positive, secondsAt, stacked, valueAt } from "../src/lib/series";

const list: SeriesList = {
  run: "r",
  rounds_done: 2,
  clock_rounds: [1, 2],
  seconds: [1, 3],
  series: [
    { kind: "evaluate", name: "loss", rounds: [0, 2], values: [2, 1], total: 2, exact: true },
    { kind: "round", name: "train-seconds", rounds: [1, 2], values: [1, 2], total: 2, exact: true },
    { kind: "round", name: "sent-bytes", rounds: [1, 2], values: [null, null], total: 2, exact: true },
  ],
};

function round(number: number, loss?: number | null): RoundItem {
  return {
    round: number,
    invited: 3,
    participants: 2,
    failed: 1,
    rejected: 0,
    missing: 0,
    seconds: { select: 0.5, train: 1, fold: 9, finish: 0.25, evaluate: 0.25, checkpoint: null },
    sent_bytes: 10,
    received_bytes: 20,
    has_checkpoint: false,
    committed_at: "2026-01-01T00:00:00Z",
    metrics: { train: {}, evaluate: loss === undefined ? {} : { loss }, diagnostics: {} },
  };
}

describe("new rounds", () => {
  it("are added to every series that has a value, once", () => {
    const next = extended(list, [round(2, 7), round(3, 0.5), round(4), round(5, null)]);
    expect(next.rounds_done).toBe(5);
    expect(next.series[0]).toMatchObject({ rounds: [0, 2, 3, 5], values: [2, 1, 0.5, null], total: 4 });
    expect(next.series[1]?.values).toEqual([1, 2, 1, 1, 1]);
    expect(next.series[2]?.values).toEqual([null, null, 10, 10, 10]);
    // Folding is part of training and must not be counted twice.
    expect(next.seconds).toEqual([1, 3, 5, 7, 9]);
    expect(list.series[0]?.rounds).toEqual([0, 2]);
  });

  it("leave the list as it is when all are known", () => {
    expect(extended(list, [round(1), round(2)])).toBe(list);
  });

  it("must follow without a gap", () => {
    expect(follows(list, [round(3)])).toBe(true);
    expect(follows(list, [round(1), round(2), round(3)])).toBe(true);
    expect(follows(list, [round(4)])).toBe(false);
    expect(follows(list, [])).toBe(true);
  });
});

describe("series on one axis", () => {
  it("tell no value from a value that is no number", () => {
    const { x, columns } = aligned([
      { rounds: [1, 3], values: [10, null] },
      { rounds: [2, 3], values: [5, 6] },
    ]);
    expect(x).toEqual([1, 2, 3]);
    expect(columns).toEqual([
      [10, undefined, null],
      [undefined, 5, 6],
    ]);
  });

  it("are placed in time by the clock", () => {
    expect(secondsAt([0, 1, 2, 4], [1, 2, 4], [1, 3, 9])).toEqual([0, 1, 3, 9]);
    expect(secondsAt([3], [1, 5], [1, 9])).toEqual([5]);
    expect(secondsAt([0], [], [])).toEqual([0]);
  });

  it("are stacked with nothing for a missing value", () => {
    expect(stacked([[1, null], [2, 3]])).toEqual([[1, 0], [3, 3]]); // prettier-ignore
  });

  it("keep on a logarithmic axis what it can show", () => {
    expect(positive([1, 0, -1, null, undefined])).toEqual([1, null, null, null, undefined]);
  });
});

it("the value without a cursor is the last known one", () => {
  expect(valueAt([1, 2, null, undefined], null)).toBe(2);
  expect(valueAt([1, 2], 0)).toBe(1);
  expect(valueAt([], null)).toBeNull();
});

it("shares and losses share a chart, counts of the engine have none", () => {
  const groups = metricGroups([
    { kind: "train", name: "participants" },
    { kind: "train", name: "train-seconds" },
    { kind: "train", name: "train-loss" },
    { kind: "evaluate", name: "loss" },
    { kind: "evaluate", name: "accuracy" },
    { kind: "evaluate", name: "perplexity" },
    { kind: "diagnostics", name: "rho" },
  ]);
  expect(groups.map((group) => [group.title, group.keys])).toEqual([
    ["Accuracy", ["evaluate/accuracy"]],
    ["Loss", ["train/train-loss", "evaluate/loss"]],
    ["perplexity", ["evaluate/perplexity"]],
  ]);
});
