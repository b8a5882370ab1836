import { beforeAll, describe, expect, it, vi } from "vitest";
import { sparkPath } from "../src/components/sparkline";
import { runLabels } from "../src/lib/labels";
import { differences, flattened } from "../src/lib/tree";

let router: typeof import("../src/router");
let client: typeof import("../src/api/client");
beforeAll(async () => {
  vi.stubGlobal("location", { search: "?page=run&run=a1" });
  router = await import("../src/router");
  client = await import("../src/api/client");
});

describe("an address", () => {
  it("keeps what is not changed and drops what is empty", () => {
    expect(router.address({ run: null, tab: "clients", q: "" }, router.params())).toBe("?page=run&tab=clients");
    expect(router.address({ runs: "a,b", zoom: "1:20" })).toBe("?runs=a,b&zoom=1:20");
    expect(router.address({ q: "a&b=c#d <i>" })).toBe("?q=a%26b%3Dc%23d+%3Ci%3E");
  });

  it("is read with suspicion", () => {
    expect(router.pair("3:17")).toEqual([3, 17]);
    expect(router.pair("0.5:2")).toEqual([0.5, 2]);
    for (const bad of [null, "", "17:3", "3:3", "a:b", "1:2:3", "1e9:2e9", "NaN:Infinity"]) {
      expect(router.pair(bad)).toBeNull();
    }
    expect(router.list("a,,b,a")).toEqual(["a", "b"]);
  });

  it("of the API repeats a parameter with several values", () => {
    expect(client.api("compare", { run: ["a", "b"], metric: null, x: "round" })).toBe("api/v1/compare?run=a&run=b&x=round");
  });
});

describe("settings", () => {
  it("are compared leaf by leaf", () => {
    const [left, right] = [{ a: { b: 1, c: [1, 2] }, d: "x" }, { a: { b: 2, c: [1, 2] }, e: null }];
    expect(flattened(left)).toEqual([["a.b", 1], ["a.c", [1, 2]], ["d", "x"]]); // prettier-ignore
    expect(differences([left, right])).toEqual([
      { path: "a.b", values: ["1", "2"] },
      { path: "d", values: ["x", null] },
      { path: "e", values: [null, "not set"] },
    ]);
  });
});

it("runs get the shortest names that tell them apart", () => {
  const run = (id: string, name: string, strategy: string, seed = 0) => ({ id, name, strategy, seed });
  const names = (runs: ReturnType<typeof run>[]) => [...runLabels(runs).values()];
  expect(names([run("1", "n", "fedavg"), run("2", "n", "fedau")])).toEqual(["fedavg", "fedau"]);
  expect(names([run("1", "n", "fedavg"), run("2", "m", "fedavg")])).toEqual(["n", "m"]);
  expect(names([run("1", "n", "s", 1), run("2", "n", "s", 2)])).toEqual(["n · s · seed 1", "n · s · seed 2"]);
  expect(names([run("1", "n", "s"), run("2", "n", "s")])).toEqual(["n · s · 1", "n · s · 2"]);
});

it("a sparkline has a gap where a value is missing", () => {
  expect(sparkPath([0, 1, null, 1, 0])).toMatch(/^M[\d. ]+L[\d. ]+M[\d. ]+L[\d. ]+$/);
  expect(sparkPath([null])).toBe("");
  expect(sparkPath([1])).toContain("h0.1");
});
