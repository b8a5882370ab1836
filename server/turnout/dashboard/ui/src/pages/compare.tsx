/** Up to eight runs beside each other: curves, final table, who took part, what they were told differently. */

import { useEffect, useMemo } from "preact/hooks";
import type { Comparison, RunDetail, RunList } from "../api/client";
import { api } from "../api/client";
import { useLoad } from "../api/load";
import { useRuns } from "../api/runs";
import { CompareTable } from "../components/compare-table";
import { Chart } from "../components/chart";
import { DiffTable } from "../components/diff-table";
import { HeatLegend } from "../components/heat-legend";
import { HeatMap } from "../components/heatmap";
import { Choice, Name, Pending, Section, Select } from "../components/parts";
import { bytes, count, metric, plain, seconds, title } from "../lib/format";
import { seriesStyle, useTheme } from "../lib/palette";
import { runLabels } from "../lib/labels";
import { differences } from "../lib/tree";
import { useLive } from "../live";
import { address, go, list, pair, set } from "../router";
import { MOST_COMPARED } from "./runs";
import { heatView, OrderChoice, rowOrder } from "./run-overview";

const AXES = [
  ["round", "rounds"],
  ["seconds", "seconds"],
  ["bytes", "bytes"],
] as const;
type Axis = (typeof AXES)[number][0];

export function ComparePage({ query }: { query: URLSearchParams }) {
  const ids = list(query.get("runs")).slice(0, MOST_COMPARED);
  const x = (AXES.find(([name]) => name === query.get("x"))?.[0] ?? "round") as Axis;
  const url = api("compare", { run: ids, metric: query.get("metric"), x, target: query.get("target"), points: 1_000 });
  const found = useLoad<Comparison>(ids.length > 0 ? url : null, 1_500);
  const runs = useRuns(ids);
  useEffect(() => {
    document.title = "Compare · Turnout";
  }, []);
  useLive({
    update: ({ rounds, runs: changed }) => (rounds.length > 0 || changed.length > 0) && found.reload(),
    resync: found.reload,
  });
  const labels = useMemo(() => runLabels(runs.data ?? []), [runs.data]);
  const data = ids.length > 0 ? found.data : null;
  return (
    <>
      <h1 tabIndex={-1}>Compare</h1>
      <Chosen ids={ids} labels={labels} />
      {ids.length === 0 && <p class="empty card">Choose up to {MOST_COMPARED} runs here, or tick them in the list of runs.</p>}
      {ids.length > 0 && !data && <Pending error={found.error} retry={found.reload} />}
      {data && (
        <>
          {found.error && <Pending error={found.error} retry={found.reload} />}
          <Section id="compare-curves" title={`${title(data.name)} by ${x === "round" ? "rounds" : x}`} tools={<Tools query={query} data={data} x={x} />}>
            <Overlay data={data} labels={labels} query={query} x={x} />
          </Section>
          <Section id="compare-table" title="How they ended" tools={<Target query={query} data={data} />}>
            <CompareTable data={data} labels={labels} />
          </Section>
        </>
      )}
      {runs.data && runs.data.length > 0 && (
        <>
          <Section id="compare-participation" title="Who took part" tools={<OrderChoice query={query} />}>
            <HeatLegend />
            <div class="grid">
              {runs.data.map((run) => (
                <SmallHeat key={run.id} run={run} label={labels.get(run.id) ?? run.id} query={query} />
              ))}
            </div>
          </Section>
          {runs.data.length > 1 && (
            <Section id="compare-config" title="Settings that differ">
              <DiffTable
                columns={runs.data.map((run) => labels.get(run.id) ?? run.id)}
                rows={differences(runs.data.map((run) => run.config))}
              />
            </Section>
          )}
        </>
      )}
    </>
  );
}

function Chosen({ ids, labels }: { ids: string[]; labels: ReadonlyMap<string, string> }) {
  const { colours } = useTheme();
  const all = useLoad<RunList>(api("runs", { limit: 200 }));
  const others = (all.data?.items ?? []).filter((run) => !ids.includes(run.id));
  const change = (next: string[]) => set({ runs: next.join(",") });
  return (
    <ul class="chips" aria-label="Runs compared">
      {ids.map((id, index) => (
        <li key={id} style={{ borderColor: seriesStyle(colours, index).colour }}>
          <a href={address({ page: "run", run: id })}>
            <Name text={labels.get(id) ?? id} />
          </a>
          <button type="button" class="icon" aria-label={`Remove run ${id}`} onClick={() => change(ids.filter((one) => one !== id))}>
            ✕
          </button>
        </li>
      ))}
      {ids.length < MOST_COMPARED && others.length > 0 && (
        <li class="add">
          <Select
            label="Add"
            value=""
            options={[["", "a run …"], ...others.map((run) => [run.id, `${run.name} · ${run.strategy} · ${run.id}`] as const)]}
            onChange={(id) => id && change([...ids, id])}
          />
        </li>
      )}
    </ul>
  );
}

function Tools({ query, data, x }: { query: URLSearchParams; data: Comparison; x: Axis }) {
  return (
    <>
      <Select
        label="Number"
        value={`${data.kind}/${data.name}`}
        options={data.available.map((name) => [name, name] as const)}
        onChange={(name) => set({ metric: name, zoom: null, target: null })}
      />
      <Choice label="Horizontal axis" value={x} options={AXES} onChange={(to) => set({ x: to === "round" ? null : to, zoom: null })} />
      <button type="button" aria-pressed={query.has("log")} onClick={() => set({ log: query.has("log") ? null : 1 })}>
        log
      </button>
    </>
  );
}

function Overlay({ data, labels, query, x }: { data: Comparison; labels: ReadonlyMap<string, string>; query: URLSearchParams; x: Axis }) {
  const { at, lines } = useMemo(() => {
    const places = data.x.flatMap((value, index) => (value == null ? [] : [{ value, index }]));
    return {
      at: places.map(({ value }) => value),
      lines: data.series.map((series, style) => ({
        label: labels.get(series.run) ?? series.run,
        values: places.map(({ index }) => series.values[index] ?? null),
        style,
      })),
    };
  }, [data, labels]);
  if (at.length === 0) {
    const why = x === "bytes" ? "None of these runs counted bytes: nothing travels in a simulation." : "None of these runs has this number yet.";
    return <p class="empty">{why}</p>;
  }
  const write = { round: count, seconds, bytes }[x];
  return (
    <Chart
      title={`${data.name} by ${x}`}
      x={at}
      lines={lines}
      xLabel={x === "round" ? "round" : x === "seconds" ? "time in rounds" : "model bytes"}
      xFormat={write}
      format={(value) => metric(data.name, value)}
      height={320}
      join
      log={query.has("log")}
      zoom={pair(query.get("zoom"))}
      onZoom={(zoom) => set({ zoom: zoom && zoom.map((value) => Number(value.toPrecision(5))).join(":") })}
    />
  );
}

function Target({ query, data }: { query: URLSearchParams; data: Comparison }) {
  const sign = data.higher_is_better ? "≥" : "≤";
  return (
    <label class="select">
      <span>
        Target: {plain(data.name)} {sign}
      </span>
      <input
        type="number"
        step="any"
        size={8}
        value={query.get("target") ?? ""}
        onChange={(event) => set({ target: event.currentTarget.value })}
      />
    </label>
  );
}

function SmallHeat({ run, label, query }: { run: RunDetail; label: string; query: URLSearchParams }) {
  const totals = useMemo(() => ({ clients: run.num_clients, rounds: run.rounds_done }), [run.num_clients, run.rounds_done]);
  const [rows, rounds] = [query.get("rows"), query.get("rounds")];
  const view = useMemo(() => heatView(rows, rounds, totals.clients, totals.rounds), [rows, rounds, totals]);
  return (
    <div>
      <h3>
        <Name text={label} />
      </h3>
      {totals.rounds === 0 ? (
        <p class="empty">No round has ended yet.</p>
      ) : (
        <HeatMap
          run={run.id}
          totals={totals}
          compact
          name={label}
          order={rowOrder(query)}
          view={view}
          onView={(next) => set({ rows: next && `${next.top + 1}:${next.bottom + 1}`, rounds: next && `${next.first}:${next.last}` })}
          onOpen={(client) => go(address({ page: "run", run: run.id, tab: "clients", client }))}
        />
      )}
    </div>
  );
}
