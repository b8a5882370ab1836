/** Keeps an image of at least what is shown: loads what is missing, and of new rounds only these. */

import { useEffect, useRef, useState } from "preact/hooks";
import type { ParticipationLayout } from "../api/client";
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
  width: number;
  height: number;
  colours: Palette;
}

const SETTLE = 60;
const LIVE_EVERY = 2_000;

interface Held {
  key: string;
  image: HeatImage;
  /** What it was made of, to paint it again in other colours. */
  layout: ParticipationLayout;
  bytes: Uint8Array;
}

export function useHeatImage(want: Wanted): { image: HeatImage | null; version: number } {
  const { run, order, totals, view, width, height, colours } = want;
  const held = useRef<Held | null>(null);
  const loadedAt = useRef(0);
  const [version, setVersion] = useState(0);
  const key = `${run} ${order} ${colours.background}`;

  useEffect(() => {
    if (width === 0 || totals.clients === 0 || totals.rounds === 0) return;
    const abort = new AbortController();
    const step = nextStep(held.current, key, want);
    if (!step) return;
    const quiet = step.live ? Math.max(SETTLE, LIVE_EVERY - (performance.now() - loadedAt.current)) : SETTLE;
    const timer = setTimeout(() => void load(step.request, step.append), held.current?.key === key ? quiet : 0);

    async function load(request: Request, append: boolean): Promise<void> {
      try {
        const { layout, bytes } = await loadParticipation(run, order, request, abort.signal);
        if (abort.signal.aborted) return;
        loadedAt.current = performance.now();
        const old = held.current;
        if (append && old && old.key === key && old.image.continues(layout)) old.image.append(layout, bytes);
        else held.current = { key, image: new HeatImage(layout, bytes, colours), layout, bytes };
        setVersion((now) => now + 1);
      } catch {
        // The banner tells that the server is away; the next change tries again.
      }
    }
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [key, view.top, view.bottom, view.first, view.last, totals.clients, totals.rounds, width > 0, width, height]);

  return { image: held.current?.key.startsWith(`${run} ${order} `) ? held.current.image : null, version };
}

/** What to load next: everything wanted, or only the rounds that came since. */
function nextStep(held: Held | null, key: string, want: Wanted): { request: Request; append: boolean; live: boolean } | null {
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
