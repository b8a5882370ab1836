import { describe, expect, it } from "vitest";
import { colourTables, rgb } from "../src/lib/heat-image";
import {
  cellAt,
  clamped,
  columns,
  isWhole,
  panned,
  revealing,
  rows,
  shows,
  steps,
  ticks,
  wanted,
  whole,
  zoomed,
} from "../src/lib/heat-view";

const totals = { clients: 1000, rounds: 5000 };
const view = { top: 100, bottom: 149, first: 1001, last: 1200 };

describe("the view", () => {
  it("stays inside of the matrix and keeps its size", () => {
    expect(panned(view, totals, -500, 99_999)).toEqual({ top: 0, bottom: 49, first: 4801, last: 5000 });
    expect(clamped({ top: -5, bottom: 4000, first: 0, last: 9999 }, totals)).toEqual(whole(totals));
  });

  it("zooms about a cell that keeps its place", () => {
    const near = zoomed(view, totals, 0.5, { row: 125, round: 1101 });
    expect([rows(near), columns(near)]).toEqual([25, 100]);
    const place = (at: typeof view) => (1101 - at.first) / columns(at);
    expect(Math.abs(place(near) - place(view))).toBeLessThan(1 / columns(near));
  });

  it("zooms out to everything and in to a few cells, not further", () => {
    let now = view;
    for (let turn = 0; turn < 40; turn += 1) now = zoomed(now, totals, 2, { row: 120, round: 1100 });
    expect(isWhole(now, totals)).toBe(true);
    for (let turn = 0; turn < 40; turn += 1) now = zoomed(now, totals, 0.5, { row: 120, round: 1100 });
    expect([rows(now), columns(now)]).toEqual([4, 8]);
    expect(now.top <= 120 && now.bottom >= 120 && now.first <= 1100 && now.last >= 1100).toBe(true);
  });

  it("moves as little as it takes to show a cell", () => {
    expect(revealing(view, totals, { row: 120, round: 1100 })).toBe(view);
    expect(revealing(view, totals, { row: 150, round: 1000 })).toEqual({ top: 101, bottom: 150, first: 1000, last: 1199 });
  });

  it("of a tiny run is the whole run", () => {
    const tiny = { clients: 2, rounds: 1 };
    expect(clamped(zoomed(whole(tiny), tiny, 0.5, { row: 0, round: 1 }), tiny)).toEqual(whole(tiny));
  });
});

describe("what is loaded", () => {
  it("is never more than a few cells per pixel, however large the run", () => {
    const request = wanted(whole(totals), totals, 1000, 400);
    expect([request.maxRows, request.maxColumns]).toEqual([334, 1000]);
    expect(steps(whole(totals), 1000, 400)).toEqual([3, 5]);
  });

  it("has half a screen more on each side, so that a small move loads nothing", () => {
    const request = wanted(view, totals, 1000, 400);
    expect(request).toMatchObject({ top: 75, bottom: 174, first: 901, last: 1300 });
    const loaded = { first_client: 75, first_round: 901, last_round: 1300, rows: 100, row_step: 1, column_step: 1 };
    expect(shows(loaded, panned(view, totals, 20, 80), totals, 1000, 400)).toBe(true);
    expect(shows(loaded, panned(view, totals, 30, 0), totals, 1000, 400)).toBe(false);
    expect(shows({ ...loaded, column_step: 2 }, view, totals, 1000, 400)).toBe(false);
  });
});

it("finds the cell under the pointer, none beyond the edge", () => {
  expect(cellAt(view, 0, 0, 1000, 500)).toEqual({ row: 100, round: 1001 });
  expect(cellAt(view, 999, 499, 1000, 500)).toEqual({ row: 149, round: 1200 });
  expect(cellAt(view, 1000, 0, 1000, 500)).toBeNull();
  expect(cellAt(view, -1, 0, 1000, 500)).toBeNull();
});

it("labels few and friendly rounds", () => {
  expect(ticks(1, 5000, 10)).toEqual([500, 1000, 1500, 2000, 2500, 3000, 3500, 4000, 4500, 5000]);
  expect(ticks(1, 1, 10)).toEqual([1]);
  for (const last of [7, 63, 812, 44_321]) expect(ticks(1, last, 8).length).toBeLessThanOrEqual(9);
});

it("mixes the colours of the palette, opaque", () => {
  const outcomes = { absent: "#000000", ok: "#ff8000", failed: "#010203" };
  const colours = { series: [], ink: "#111111", muted: "", grid: "", background: "#222222", outcomes, sequential: [] };
  const tables = colourTables(colours, ["absent", "ok", "failed"]);
  expect(rgb("#ff8000")).toEqual([255, 128, 0]);
  expect(tables.outcome[2]?.toString(16)).toBe("ff030201");
  expect([tables.share[0], tables.share[255]]).toEqual([tables.outcome[0], tables.outcome[1]]);
  expect(tables.share[128]?.toString(16)).toBe("ff004080");
});
