/** Does the model serve all clients? The spread of a number over them, and the worst tenth. */

import type { Fairness as Document } from "../api/client";
import { api } from "../api/client";
import { useLoad } from "../api/load";
import type { TabProps } from "../pages/run";
import { count, metric, number, percent, plain } from "../lib/format";
import { useLive } from "../live";
import { address, set } from "../router";
import { Histogram } from "./histogram";
import { Pending, Section, Select, Tile } from "./parts";
import { Scatter } from "./scatter";

export function Fairness({ run, query }: TabProps) {
  const asked = query.get("fair");
  const found = useLoad<Document>(api(`runs/${run.id}/fairness`, { metric: asked }), 3_000);
  useLive({
    update: ({ rounds }) => rounds.some((one) => one.run === run.id) && found.reload(),
    resync: found.reload,
  });
  const data = found.data;
  const picker = data && data.available.length > 1 && (
    <Select
      label="Number"
      value={data.metric}
      options={data.available.map((name) => [name, name] as const)}
      onChange={(name) => set({ fair: name })}
    />
  );
  return (
    <Section id="fairness" title="Fairness" tools={picker || undefined}>
      {!data && <Pending error={found.error} retry={found.reload} />}
      {data && data.clients === 0 && (
        <p class="empty">No client has reported {plain(data.metric)} yet, so how it is spread is not known.</p>
      )}
      {data && data.clients > 0 && <Spread data={data} run={run.id} />}
    </Section>
  );
}

function Spread({ data, run }: { data: Document; run: string }) {
  const say = (value: number | null | undefined) => metric(data.metric, value);
  const worse = data.higher_is_better ? "lowest" : "highest";
  return (
    <>
      <dl class="tiles">
        <Tile label="Mean" note={`± ${say(data.deviation)}`}>
          {say(data.mean)}
        </Tile>
        <Tile label="Median" note={`${say(data.quantiles["p5"])} to ${say(data.quantiles["p95"])} for 90 %`}>
          {say(data.quantiles["p50"])}
        </Tile>
        <Tile label="Worst tenth" note={`mean of the ${worse}`}>
          {say(data.worst_tenth)}
        </Tile>
        <Tile label="Gini" note="0: all alike">
          {number(data.gini)}
        </Tile>
        <Tile label="Goes with participation" note="correlation, −1 to 1">
          {number(data.correlation)}
        </Tile>
        <Tile label="Clients" note={data.without > 0 ? `${count(data.without)} without a value` : undefined}>
          {count(data.clients)}
        </Tile>
      </dl>
      <div class="grid">
        <Histogram title={`Clients by ${data.metric}`} bins={data.histogram} format={say} mark={data.worst_tenth} />
        <Scatter title={`${data.metric} by participation`} points={data.points} format={say} />
      </div>
      <h3>Worst first</h3>
      <ol class="worst">
        {data.worst.map((one) => (
          <li key={one.client}>
            <a href={address({ page: "run", run, tab: "clients", client: one.client })}>client {one.client}</a>{" "}
            {say(one.value)} <span class="note">took part in {percent(one.participation, 0)}</span>
          </li>
        ))}
      </ol>
    </>
  );
}
