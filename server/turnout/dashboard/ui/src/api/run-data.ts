/** A run's series, kept up to date by the stream. */

import { useEffect, useRef, useState } from "preact/hooks";
import { useLive } from "../live";
import { extended, follows } from "../lib/series";
import { api, type SeriesList } from "./client";
import { type Loaded, useLoad } from "./load";

/** Points per series that a chart is worth; the server keeps the extremes. */
const POINTS = 2_000;

/** Loads the series called kind/name; new rounds are added as they come. */
export function useSeries(run: string, names: readonly string[]): Loaded<SeriesList> {
  const url = names.length > 0 ? api(`runs/${encodeURIComponent(run)}/series`, { name: names, points: POINTS }) : null;
  const loaded = useLoad<SeriesList>(url, 1_000);
  const [data, show] = useState<SeriesList | null>(null);
  // Messages may come faster than the page is drawn: each adds to what the one before it made.
  const newest = useRef<SeriesList | null>(null);
  const setData = (next: SeriesList | null) => {
    newest.current = next;
    show(next);
  };
  useEffect(() => setData(loaded.data), [loaded.data]);
  useLive({
    update: ({ rounds }) => {
      const mine = rounds.find((one) => one.run === run);
      if (!mine || !newest.current) return;
      if (follows(newest.current, mine.items)) setData(extended(newest.current, mine.items));
      else loaded.reload();
    },
    resync: (runs) => {
      if (runs.length === 0 || runs.includes(run)) loaded.reload();
    },
  });
  // Old series must not be shown under new names.
  const fits = data != null && loaded.data != null && data.run === run && names.every((name) => has(data, name));
  return { ...loaded, data: fits ? data : null };
}

function has(list: SeriesList, name: string): boolean {
  return list.series.some((series) => `${series.kind}/${series.name}` === name);
}
