/** Where the time and the bytes went, and how many took part, round by round. */

import type { ComponentChildren } from "preact";
import { useMemo } from "preact/hooks";
import type { SeriesList } from "../api/client";
import { useSeries } from "../api/run-data";
import { Chart } from "../components/chart";
import { Pending, Section } from "../components/parts";
import type { Num } from "../lib/format";
import { bytes, count, seconds } from "../lib/format";
import { useTheme } from "../lib/palette";
import { aligned, key, PHASES } from "../lib/series";
import { pair, set } from "../router";
import type { TabProps } from "./run";

const OUTCOMES = ["participants", "failed", "rejected", "missing"] as const;
const WORDS: Record<string, string> = { participants: "took part", failed: "failed", rejected: "rejected", missing: "no reply" };
const NAMES = [
  ...PHASES.map((phase) => `round/${phase}-seconds`),
  "round/sent-bytes",
  "round/received-bytes",
  ...OUTCOMES.map((name) => `round/${name}`),
];

export function RunRounds({ run, query }: TabProps) {
  const { colours } = useTheme();
  const series = useSeries(run.id, NAMES);
  if (!series.data) return <Pending error={series.error} retry={series.reload} />;
  if (series.data.rounds_done === 0) return <p class="empty">No round has ended yet.</p>;
  const counted = run.totals.sent_bytes != null;
  const outcomes: Record<string, string | undefined> = { ...colours.outcomes, participants: colours.outcomes["ok"] };
  return (
    <div class="grid">
      <RoundChart
        id="phases"
        title="Seconds of a round, by phase"
        list={series.data}
        names={PHASES.map((phase) => [`round/${phase}-seconds`, phase])}
        format={seconds}
        query={query}
        stack
        note="Replies are folded while they arrive: folding is part of train."
      />
      <RoundChart
        id="taking-part"
        title="Clients of a round, by outcome"
        list={series.data}
        names={OUTCOMES.map((name) => [`round/${name}`, WORDS[name] ?? name, outcomes[name]])}
        format={count}
        query={query}
        stack
      />
      {counted ? (
        <RoundChart
          id="bytes"
          title="Model bytes of a round"
          list={series.data}
          names={[
            ["round/sent-bytes", "to the clients"],
            ["round/received-bytes", "from the clients"],
          ]}
          format={bytes}
          query={query}
        />
      ) : (
        <Section id="bytes" title="Model bytes of a round">
          <p class="empty">Nothing travels in a simulation, so no bytes were counted. A run of <code>turnout server</code> has them.</p>
        </Section>
      )}
    </div>
  );
}

interface RoundChartProps {
  id: string;
  title: string;
  list: SeriesList;
  /** Series, words and, where it has a meaning, colour. */
  names: readonly (readonly [series: string, words: string, colour?: string | undefined])[];
  format: (value: Num) => string;
  query: URLSearchParams;
  stack?: boolean;
  note?: ComponentChildren;
}

function RoundChart({ id, title, list, names, format, query, stack = false, note }: RoundChartProps) {
  const { x, lines } = useMemo(() => {
    const chosen = names.flatMap(([name, words, colour]) => {
      const found = list.series.find((series) => key(series) === name);
      return found ? [{ found, words, colour }] : [];
    });
    const { x, columns } = aligned(chosen.map(({ found }) => found));
    return { x, lines: chosen.map(({ words, colour }, index) => ({
        label: words,
        values: columns[index] ?? [],
        ...(colour ? { colour } : {}),
      })),
     };
  }, [list, names.map(([, , colour]) => colour).join()]);
  return (
    <Section id={id} title={title}>
      <Chart
        title={title}
        x={x}
        lines={lines}
        xLabel="round"
        format={format}
        stack={stack}
        zoom={pair(query.get("zoom"))}
        onZoom={(zoom) => set({ zoom: zoom && zoom.map((value) => Number(value.toPrecision(5))).join(":") })}
        sync="rounds"
      />
      {note && <p class="note">{note}</p>}
    </Section>
  );
}
