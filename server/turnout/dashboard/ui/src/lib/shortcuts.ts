/** Keys of the page. One key, no modifier, never while typing. */

import { useEffect, useRef } from "preact/hooks";

export type Shortcuts = Record<string, (event: KeyboardEvent) => void>;

/** What `?` shows. */
export const SHORTCUTS: { where: string; keys: [string, string][] }[] = [
  {
    where: "Everywhere",
    keys: [
      ["?", "show or hide this list"],
      ["g", "go to the runs"],
      ["m", "go to the methods"],
      ["t", "light, dark, or as the system has it"],
    ],
  },
  {
    where: "Runs",
    keys: [
      ["/", "search"],
      ["j / k", "next or previous run"],
      ["x", "select the run for a comparison"],
      ["c", "compare the selected runs"],
      ["Enter", "open the run"],
    ],
  },
  {
    where: "Charts (after Tab to one)",
    keys: [
      ["← →", "move the cursor"],
      ["+ / − / 0", "zoom in, out, show all"],
    ],
  },
  {
    where: "Heat map (after Tab to it)",
    keys: [
      ["← → ↑ ↓", "move from cell to cell"],
      ["Page up/down, Home, End", "move by a screen, to the first or last round"],
      ["+ / − / 0", "zoom in, out, show all"],
      ["Enter", "open the client"],
    ],
  },
];

function typing(target: EventTarget | null): boolean {
  const element = target as HTMLElement | null;
  return !!element?.closest("input:not([type=checkbox]), select, textarea, dialog");
}

export function useShortcuts(shortcuts: Shortcuts): void {
  const newest = useRef(shortcuts);
  newest.current = shortcuts;
  useEffect(() => {
    const listener = (event: KeyboardEvent) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || typing(event.target)) return;
      const action = newest.current[event.key];
      if (!action) return;
      event.preventDefault();
      action(event);
    };
    addEventListener("keydown", listener);
    return () => removeEventListener("keydown", listener);
  }, []);
}
