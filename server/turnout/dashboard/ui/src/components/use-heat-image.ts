/** Keeps an image of at least what is shown: loads what is missing, and of new rounds only these. */

import { useEffect, useRef, useState } from "preact/hooks";
import type { RowOrder } from "../api/participation";
import { loadParticipation } from "../api/participation";
import { HeatImage } from "../lib/heat-image";
import type { Request, Totals, View } from "../lib/heat-view";
import { shows, steps, wanted } from "../lib/heat-view";
import type { Palette } from "../lib/palette";

interface Wanted {
  run: string;
  order: RowOrder;
  totals: Totals;
  view: View;
  /** Whether the view is all there is, and grows with it. */
  follow: boolean;
  width: number;
  height: number;
  colours: Palette;
}

const SETTLE = 60;
const LIVE_EVERY = 2_000;
const RETRY_AFTER = 3_000;

interface Held {
  key: string;
  image: HeatImage;
}

/** One load under way, and what it is for. */
interface Pending {
  abort: AbortController;
  place: string;
}

export function useHeatImage(want: Wanted): { image: HeatImage | null; version: number } {
  const { run, order, totals, view, follow, width, height, colours } = want;
  const held = useRef<Held | null>(null);
  const pending = useRef<Pending | null>(null);
  const loadedAt = useRef(0);
  const [version, setVersion] = useState(0);
  const key = `${run} ${order} ${colours.background}`;
  const window = follow ? "all" : `${view.top}:${view.bottom},${view.first}:${view.last}`;
  const place = `${key} ${window} ${width}x${height}`;

  useEffect(() => {
    if (width === 0 || totals.clients === 0 || totals.rounds === 0) return;
    // A load for the same place goes on when rounds are added meanwhile; these are looked at after it.
    if (pending.current?.place === place) return;
    pending.current?.abort.abort();
    pending.current = null;
    const step = nextStep(held.current, key, want);
    if (!step) return;
    const abort = new AbortController();
    pending.current = { abort, place };
    const quiet = step.live ? Math.max(SETTLE, LIVE_EVERY - (performance.now() - loadedAt.current)) : SETTLE;
    const timer = setTimeout(() => void load(step, abort.signal), held.current?.key === key ? quiet : 0);
    abort.signal.addEventListener("abort", () => clearTimeout(timer));
  }, [place, totals.clients, totals.rounds, version]);
  useEffect(() => () => pending.current?.abort.abort(), []);

  async function load({ request, append }: Step, signal: AbortSignal): Promise<void> {
    try {
      const { layout, bytes } = await loadParticipation(run, order, request, signal);
      if (signal.aborted) return;
      loadedAt.current = performance.now();
      const old = held.current;
      if (append && old?.key === key && old.image.continues(layout)) old.image.append(layout, bytes);
      else held.current = { key, image: new HeatImage(layout, bytes, colours) };
    } catch {
      // The banner tells that the server is away.
      await new Promise((done) => setTimeout(done, RETRY_AFTER));
    }
    if (signal.aborted) return;
    pending.current = null;
    setVersion((now) => now + 1);
  }

  return { image: held.current?.key.startsWith(`${run} ${order} `) ? held.current.image : null, version };
}

interface Step {
  request: Request;
  /** Only rounds that are new, to be added to what is there. */
  append: boolean;
  /** Not urgent: what is shown lacks only the newest rounds. */
  live: boolean;
}

/** What to load next: everything wanted, or only the rounds that came since. */
function nextStep(held: Held | null, key: string, want: Wanted): Step | null {
  const { totals, view, width, height, order } = want;
  const all = { request: wanted(view, totals, width, height), append: false, live: false };
  if (held?.key !== key) return all;
  const { layout, exact } = held.image;
  if (shows(layout, view, totals, width, height)) return null;
  const past = { ...view, last: Math.min(view.last, layout.last_round) };
  const onlyNewRounds = past.first <= past.last && shows(layout, past, totals, width, height);
  if (!onlyNewRounds) return all;
  const [rowStep, columnStep] = steps(view, width, height);
  // An order by what changes moves the rows; an overview shares cells: both are loaded whole, now and then.
  if (order !== "client" || !exact || rowStep > 1 || columnStep > 1) return { ...all, live: true };
  const top = layout.first_client;
  const request = { top, bottom: top + layout.rows - 1, first: layout.last_round + 1, last: totals.rounds };
  return { request: { ...request, maxRows: layout.rows, maxColumns: totals.rounds }, append: true, live: false };
}
