/** What the strategy says of itself: one small chart per number. */

import { useMemo } from "preact/hooks";
import type { Series } from "../api/client";
import { useSeries } from "../api/run-data";
import { Chart } from "../components/chart";
import { Pending, Section } from "../components/parts";
import { metric, plain, title } from "../lib/format";
import { key } from "../lib/series";
import { pair, set } from "../router";
import type { TabProps } from "./run";

/** As many series as the server gives at once. */
const MOST = 32;

export function RunDiagnostics({ run, query }: TabProps) {
  const all = run.series.filter((one) => one.kind === "diagnostics").map(key);
  const names = useMemo(() => all.slice(0, MOST), [all.join("\n")]);
  const series = useSeries(run.id, names);
  if (names.length === 0) {
    return (
      <p class="empty card">
        {plain(run.strategy)} reports no numbers of its own{run.rounds_done === 0 && " yet: no round has ended"}.
      </p>
    );
  }
  if (!series.data) return <Pending error={series.error} retry={series.reload} />;
  return (
    <>
      <div class="tools spread">
        <button type="button" aria-pressed={query.has("log")} onClick={() => set({ log: query.has("log") ? null : 1 })}>
          log
        </button>
        {all.length > MOST && <span class="note">{MOST} of {all.length} numbers; an export has all of them.</span>}
      </div>
      <div class="grid small">
        {series.data.series.map((one, index) => (
          <Small key={one.name} id={`diagnostic-${index}`} series={one} query={query} />
        ))}
      </div>
    </>
  );
}

function Small({ id, series, query }: { id: string; series: Series; query: URLSearchParams }) {
  const lines = useMemo(() => [{ label: series.name, values: series.values }], [series]);
  return (
    <Section id={id} title={title(series.name)}>
      <Chart
        title={series.name}
        x={series.rounds}
        lines={lines}
        xLabel="round"
        format={(value) => metric(series.name, value)}
        height={150}
        log={query.has("log")}
        zoom={pair(query.get("zoom"))}
        onZoom={(zoom) => set({ zoom: zoom && zoom.map((value) => Number(value.toPrecision(5))).join(":") })}
        sync="rounds"
      />
    </Section>
  );
}
