/** What matters first: who needs attention, how the model does, who took part. */

import { useMemo } from "preact/hooks";
import type { Attention, SeriesList } from "../api/client";
import { api } from "../api/client";
import { useLoad } from "../api/load";
import { ROW_ORDERS, type RowOrder } from "../api/participation";
import { useSeries } from "../api/run-data";
import { Chart } from "../components/chart";
import { HeatMap } from "../components/heatmap";
import { Choice, Pending, Section, Select } from "../components/parts";
import { plain, plural, seconds, title } from "../lib/format";
import type { Group } from "../lib/groups";
import { label, metricGroups } from "../lib/groups";
import type { View } from "../lib/heat-view";
import type { Values } from "../lib/series";
import { aligned, key, secondsAt } from "../lib/series";
import { useLive } from "../live";
import { address, go, pair, set } from "../router";
import type { TabProps } from "./run";

const MOST_CHARTS = 6;

export function RunOverview({ run, query }: TabProps) {
  return (
    <>
      <AttentionList run={run.id} />
      <Curves run={run} query={query} />
      <Section id="participation" title="Who took part" tools={<OrderChoice query={query} />}>
        <Participation run={run} query={query} />
      </Section>
    </>
  );
}

function AttentionList({ run }: { run: string }) {
  const list = useLoad<Attention>(api(`runs/${run}/attention`, { limit: 8 }), 3_000);
  useLive({ update: ({ rounds }) => rounds.some((one) => one.run === run) && list.reload(), resync: list.reload });
  if (!list.data || list.data.items.length === 0) return null;
  return (
    <Section id="attention" title="Needs attention">
      <ul class="attention">
        {list.data.items.map((item) => (
          <li key={`${item.client} ${item.kind}`}>
            <span aria-hidden="true">⚠</span>
            <a href={address({ page: "run", run, tab: "clients", client: item.client })}>client {item.client}</a>
            <span>{plain(item.message.replace(`client ${item.client}: `, ""))}</span>
          </li>
        ))}
      </ul>
      {list.data.total > list.data.items.length && (
        <p class="note">and {plural(list.data.total - list.data.items.length, "more thing")} of this kind</p>
      )}
    </Section>
  );
}

function Curves({ run, query }: TabProps) {
  const names = run.series.map(key).join("\n");
  const groups = useMemo(() => metricGroups(run.series).slice(0, MOST_CHARTS), [names]);
  const wanted = useMemo(() => [...groups.flatMap((group) => group.keys), "round/participants"], [groups]);
  const series = useSeries(run.id, groups.length > 0 ? wanted : []);
  if (groups.length === 0) {
    return (
      <Section id="curves" title="Curves">
        <p class="empty">
          {run.status === "running"
            ? "No round has ended yet. The curves begin with the first one."
            : "No metric was recorded in this run."}
        </p>
      </Section>
    );
  }
  return (
    <div class="grid">
      {groups.map((group, index) => (
        <Section key={group.title} id={`curve-${index}`} title={title(group.title)} tools={<CurveTools query={query} />}>
          {series.data ? (
            <Curve group={group} list={series.data} query={query} />
          ) : (
            <Pending error={series.error} retry={series.reload} />
          )}
        </Section>
      ))}
    </div>
  );
}

function CurveTools({ query }: { query: URLSearchParams }) {
  const x = query.get("x") === "seconds" ? "seconds" : "round";
  const options = [
    ["round", "rounds"],
    ["seconds", "seconds"],
  ] as const;
  return (
    <>
      <Choice label="Horizontal axis" value={x} options={options} onChange={(to) => set({ x: to === "round" ? null : to, zoom: null })} />
      <button type="button" aria-pressed={query.has("log")} onClick={() => set({ log: query.has("log") ? null : 1 })}>
        log
      </button>
    </>
  );
}

function Curve({ group, list, query }: { group: Group; list: SeriesList; query: URLSearchParams }) {
  const bySeconds = query.get("x") === "seconds";
  const { x, lines } = useMemo(() => {
    const chosen = list.series.filter((series) => group.keys.includes(key(series)));
    const { x: rounds, columns } = aligned([...chosen, ...emptyRounds(list)]);
    const empty = columns[chosen.length];
    const lines = chosen.map((series, index) => ({
      label: label(key(series)),
      values: withoutAnyone(columns[index] ?? [], series.kind === "train" ? empty : undefined),
    }));
    return { x: bySeconds ? secondsAt(rounds, list.clock_rounds, list.seconds) : rounds, lines };
  }, [group, list, bySeconds]);
  return (
    <Chart
      title={`${group.title} over ${bySeconds ? "seconds" : "rounds"}`}
      x={x}
      lines={lines}
      xLabel={bySeconds ? "time in rounds" : "round"}
      {...(bySeconds ? { xFormat: seconds } : {})}
      format={group.format}
      log={query.has("log")}
      zoom={pair(query.get("zoom"))}
      onZoom={(zoom) => set({ zoom: zoom && zoom.map((value) => Number(value.toPrecision(5))).join(":") })}
      sync={bySeconds ? "seconds" : "rounds"}
    />
  );
}

/** The rounds in which nobody took part, as a series of zeros. */
function emptyRounds(list: SeriesList): { rounds: number[]; values: (number | null)[] }[] {
  const participants = list.series.find((series) => key(series) === "round/participants");
  if (!participants) return [];
  const rounds = participants.rounds.filter((_, index) => participants.values[index] === 0);
  return [{ rounds, values: rounds.map(() => 0) }];
}

/** Nobody trained in a round without anyone: a line of training is broken there. The model has its held-out value still. */
function withoutAnyone(values: Values, empty: Values | undefined): Values {
  return empty ? values.map((value, at) => (empty[at] === 0 ? null : value)) : values;
}

export function rowOrder(query: URLSearchParams): RowOrder {
  const order = query.get("rows-by") ?? "";
  return order in ROW_ORDERS ? (order as RowOrder) : "client";
}

export function OrderChoice({ query }: { query: URLSearchParams }) {
  return (
    <Select
      label="Clients by"
      value={rowOrder(query)}
      options={Object.entries(ROW_ORDERS).map(([order, [words]]) => [order, words] as const)}
      onChange={(order) => set({ "rows-by": order === "client" ? null : order, rows: null })}
    />
  );
}

function Participation({ run, query }: TabProps) {
  const totals = useMemo(
    () => ({ clients: run.num_clients, rounds: run.rounds_done }),
    [run.num_clients, run.rounds_done],
  );
  const [rows, rounds] = [query.get("rows"), query.get("rounds")];
  const view = useMemo(() => heatView(rows, rounds, totals.clients, totals.rounds), [rows, rounds, totals]);
  if (totals.rounds === 0) {
    return <p class="empty">No round has ended yet; each one adds a column, each client is a row.</p>;
  }
  return (
    <HeatMap
      run={run.id}
      totals={totals}
      order={rowOrder(query)}
      view={view}
      onView={(next) =>
        set({ rows: next && `${next.top + 1}:${next.bottom + 1}`, rounds: next && `${next.first}:${next.last}` })
      }
      onOpen={(client) => go(address({ page: "run", run: run.id, tab: "clients", client }))}
    />
  );
}

/** The view that an address names (rows count from 1 there); null for all. */
export function heatView(rows: string | null, rounds: string | null, clients: number, done: number): View | null {
  const [vertical, horizontal] = [pair(rows), pair(rounds)];
  if (!vertical && !horizontal) return null;
  return {
    top: vertical ? vertical[0] - 1 : 0,
    bottom: vertical ? vertical[1] - 1 : clients - 1,
    first: horizontal ? horizontal[0] : 1,
    last: horizontal ? horizontal[1] : done,
  };
}
