/** The colours of the plots (palette.json), in light and dark. */

import { useEffect, useState } from "preact/hooks";
import file from "../../../../server/palette.json";

export type Theme = "light" | "dark";
export type Choice = Theme | "system";

export interface Palette {
  series: string[];
  ink: string;
  muted: string;
  grid: string;
  background: string;
  outcomes: Record<string, string>;
  sequential: string[];
}

const KEY = "turnout-theme";
const dashes: number[][] = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 2], [14, 4], [4, 6], [1, 2]];
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const listeners = new Set<() => void>();

export function palette(theme: Theme): Palette {
  return theme === "dark" ? file.dark : file;
}

/** Colour and dash of the index-th line: never the colour alone. */
export function seriesStyle(colours: Palette, index: number): { colour: string; dash: number[] } {
  return {
    colour: colours.series[index % colours.series.length] ?? colours.ink,
    dash: dashes[index % dashes.length] ?? [],
  };
}

export function choice(): Choice {
  const saved = read();
  return saved === "light" || saved === "dark" ? saved : "system";
}

export function theme(): Theme {
  const chosen = choice();
  return chosen === "system" ? (systemDark.matches ? "dark" : "light") : chosen;
}

export function choose(next: Choice): void {
  try {
    if (next === "system") localStorage.removeItem(KEY);
    else localStorage.setItem(KEY, next);
  } catch {
    // Storage may be forbidden; the choice then lasts as long as the page.
  }
  forgotten = next;
  changed();
}

let forgotten: Choice = "system";

function read(): string {
  try {
    return localStorage.getItem(KEY) ?? "";
  } catch {
    return forgotten;
  }
}

/** Puts the theme in force, now and whenever the system changes it. */
export function followTheme(): void {
  apply();
  systemDark.addEventListener("change", changed);
}

function changed(): void {
  apply();
  for (const listener of listeners) listener();
}

function apply(): void {
  const now = theme();
  const colours = palette(now);
  const root = document.documentElement;
  root.dataset["theme"] = now;
  for (const [name, colour] of Object.entries(colours.outcomes)) root.style.setProperty(`--outcome-${name}`, colour);
  colours.series.forEach((colour, index) => root.style.setProperty(`--series-${index}`, colour));
}

/** The theme in force; components that paint on a canvas draw again when it changes. */
export function useTheme(): { theme: Theme; colours: Palette } {
  const [now, update] = useState(theme());
  useEffect(() => {
    const listener = () => update(theme());
    listeners.add(listener);
    return () => {
      listeners.delete(listener);
    };
  }, []);
  return { theme: now, colours: palette(now) };
}
