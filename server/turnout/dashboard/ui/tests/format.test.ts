import { describe, expect, it } from "vitest";
import { bytes, metric, number, percent, plain, plural, seconds, UNKNOWN, utc } from "../src/lib/format";

describe("numbers", () => {
  it.each([
    [0, "0"],
    [0.01234, "0.0123"],
    [1.234, "1.23"],
    [12.34, "12.3"],
    [1234.5, "1,235"],
    [0.00001234, "1.23e-5"],
    [-0.25, "-0.25"],
    [null, UNKNOWN],
    [Number.NaN, UNKNOWN],
  ])("%s is written %s", (value, text) => expect(number(value)).toBe(text));

  it("knows a missing value from zero", () => {
    expect(bytes(null)).toBe(UNKNOWN);
    expect(bytes(0)).toBe("0 B");
    expect(percent(undefined)).toBe(UNKNOWN);
    expect(percent(0, 0)).toBe("0 %");
  });
});

describe("bytes", () => {
  it.each([
    [999, "999 B"],
    [1000, "1.0 kB"],
    [999_960, "1.0 MB"],
    [1_234_567, "1.2 MB"],
    [5e12, "5.0 TB"],
  ])("%s", (value, text) => expect(bytes(value)).toBe(text));
});

describe("seconds", () => {
  it.each([
    [0.00005, "50 µs"],
    [0.34, "340 ms"],
    [3.42, "3.4 s"],
    [59.97, "1 min 0 s"],
    [3599.6, "1 h 0 min"],
    [3725, "1 h 2 min"],
    [200_000, "2 d 7 h"],
  ])("%s", (value, text) => expect(seconds(value)).toBe(text));
});

describe("a metric", () => {
  it("is written as its name asks for", () => {
    expect(metric("accuracy", 0.912)).toBe("91.2 %");
    expect(metric("test/accuracy", 3)).toBe("3");
    expect(metric("loss", 0.912)).toBe("0.912");
    expect(metric("memory-bytes", 2_000_000)).toBe("2.0 MB");
  });
});

describe("text from outside", () => {
  it("loses what would break lines or turn directions", () => {
    expect(plain("a\nb\u202ec\u0000d")).toBe("a·b·c·d");
    expect(plain("<script>")).toBe("<script>");
  });
});

it("says one and many", () => {
  expect(plural(1, "round")).toBe("1 round");
  expect(plural(1200, "round")).toBe("1,200 rounds");
});

it("tells the moment in UTC whatever the zone", () => {
  expect(utc("2026-01-02T03:04:05+01:00")).toBe("2026-01-02 02:04:05 UTC");
});
