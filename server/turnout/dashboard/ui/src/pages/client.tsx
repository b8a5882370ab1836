/** One client of a run: what it is, how it fares, and every round it was asked for. */

import { useEffect, useMemo, useState } from "preact/hooks";
import type { ClientDetail, ClientRoundItem, ClientRoundPage, RunDetail } from "../api/client";
import { api, get } from "../api/client";
import { useLoad } from "../api/load";
import { Chart } from "../components/chart";
import { OUTCOME_WORDS } from "../components/heat-legend";
import { Name, Pending, Section, Tile } from "../components/parts";
import { MARKS } from "../lib/heat-draw";
import { bytes, count, number, percent, plain, plural, seconds, UNKNOWN } from "../lib/format";
import { useLive } from "../live";
import { address, pair, set } from "../router";

const PAGE = 500;

export function ClientView({ run, client, query }: { run: RunDetail; client: string; query: URLSearchParams }) {
  const path = `runs/${run.id}/clients/${client}`;
  const detail = useLoad<ClientDetail>(api(path), 2_000);
  const page = useLoad<ClientRoundPage>(api(`${path}/rounds`, { limit: PAGE }), 2_000);
  useLive({
    update: ({ rounds }) => {
      if (!rounds.some((one) => one.run === run.id)) return;
      detail.reload();
      page.reload();
    },
    resync: () => {
      detail.reload();
      page.reload();
    },
  });
  const [older, setOlder] = useState<ClientRoundItem[]>([]);
  const [next, setNext] = useState<number | null>(null);
  useEffect(() => {
    if (older.length === 0) setNext(page.data?.next ?? null);
  }, [page.data]);
  const loadOlder = async () => {
    const more = await get<ClientRoundPage>(api(`${path}/rounds`, { limit: PAGE, after: next }));
    setOlder((old) => [...old, ...more.items]);
    setNext(more.next);
  };
  const items = useMemo(() => {
    const oldest = page.data?.items.at(-1)?.round ?? 0;
    return [...(page.data?.items ?? []), ...older.filter((item) => item.round < oldest)];
  }, [page.data, older]);
  return (
    <>
      <p class="crumbs">
        <a href={address({ page: "run", run: run.id, tab: "clients" })}>← all clients</a>
      </p>
      <h2 class="client-title">Client {plain(client)}</h2>
      {detail.data ? <Facts client={detail.data} clients={run.num_clients} /> : <Pending error={detail.error} retry={detail.reload} />}
      {items.length > 0 && <Timeline items={items} query={query} />}
      <Rounds items={items} pending={page.data == null} />
      {next != null && (
        <button type="button" onClick={() => void loadOlder()}>
          Load older rounds
        </button>
      )}
    </>
  );
}

function Facts({ client, clients }: { client: ClientDetail; clients: number }) {
  const tags = Object.entries(client.tags);
  return (
    <>
      <dl class="tiles">
        <Tile label="Took part" note={`${count(client.seen)} of ${count(client.invited)} times asked`}>
          {percent(client.participation, 0)}
        </Tile>
        <Tile label="Stale" note={`longest absence ${plural(client.max_staleness, "round")}`}>
          {plural(client.staleness, "round")}
        </Tile>
        <Tile label="Weight" note={`${percent(client.weight_share, 2)} of all`}>
          {client.weight_share == null ? UNKNOWN : `${(client.weight_share * clients).toFixed(2)} × equal`}
        </Tile>
        <Tile label="Replies lost" note="failed · rejected · missing">
          {count(client.failed)} · {count(client.rejected)} · {count(client.missing)}
        </Tile>
        <Tile label="Examples">{count(client.examples)}</Tile>
        <Tile label="Training" note={client.samples_per_second == null ? undefined : `${count(client.samples_per_second)} examples/s`}>
          {seconds(client.train_seconds)}
        </Tile>
        {(client.device || client.name) && (
          <Tile label="Device" note={client.name ? <Name text={client.name} /> : undefined}>
            {client.device ? <Name text={client.device} /> : UNKNOWN}
          </Tile>
        )}
        {client.memory_bytes != null && <Tile label="Memory">{bytes(client.memory_bytes)}</Tile>}
        {(client.gpu_utilization != null || client.gpu_memory_bytes != null) && (
          <Tile label="GPU" note="memory · use">
            {bytes(client.gpu_memory_bytes)} · {percent(client.gpu_utilization, 0)}
          </Tile>
        )}
      </dl>
      {tags.length > 0 && (
        <p class="note">
          {tags.map(([name, value]) => (
            <code key={name}>{plain(`${name}=${String(value)}`)} </code>
          ))}
        </p>
      )}
    </>
  );
}

function Timeline({ items, query }: { items: readonly ClientRoundItem[]; query: URLSearchParams }) {
  const { x, lines } = useMemo(() => {
    const rounds = [...items].reverse();
    const taken = (value: (item: ClientRoundItem) => number | null) =>
      rounds.map((item) => (item.outcome === "ok" ? value(item) : null));
    return {
      x: rounds.map((item) => item.round),
      lines: {
        loss: [{ label: "training loss", values: taken((item) => item.train_loss) }],
        weight: [{ label: "weight", values: taken((item) => item.weight), style: 2 }],
        staleness: [{ label: "staleness", values: taken((item) => item.staleness), style: 3 }],
        seconds: [{ label: "training", values: taken((item) => item.train_seconds), style: 1 }],
      },
    };
  }, [items]);
  const common = {
    x,
    xLabel: "round",
    height: 150,
    sync: "rounds",
    zoom: pair(query.get("zoom")),
    onZoom: (zoom: [number, number] | null) => set({ zoom: zoom && zoom.map((at) => Number(at.toPrecision(5))).join(":") }),
  };
  return (
    <div class="grid">
      <Section id="client-loss" title="Loss">
        <Chart title="Training loss of the client" lines={lines.loss} format={number} {...common} />
      </Section>
      <Section id="client-weight" title="Weight">
        <Chart title="Weight of the client" lines={lines.weight} format={number} {...common} />
      </Section>
      <Section id="client-staleness" title="Rounds away before a reply">
        <Chart title="Staleness of the client" lines={lines.staleness} format={number} {...common} />
      </Section>
      <Section id="client-seconds" title="Seconds of training">
        <Chart title="Seconds of training of the client" lines={lines.seconds} format={seconds} {...common} />
      </Section>
    </div>
  );
}

function Rounds({ items, pending }: { items: readonly ClientRoundItem[]; pending: boolean }) {
  return (
    <Section id="client-rounds" title="Rounds it was asked for">
      {items.length === 0 && <p class="empty">{pending ? "Loading …" : "It was never asked for."}</p>}
      {items.length > 0 && (
        <div class="scroll tall" tabIndex={0} role="region" aria-label="Rounds of the client">
          <table>
            <thead>
              <tr>
                {["Round", "Outcome", "Role", "Weight", "Stale", "Loss", "Examples", "Training", "Update norm", "Reason"].map((words) => (
                  <th key={words} scope="col">
                    {words}
                  </th>
                ))}
              </tr>
            </thead>
            <tbody>
              {items.map((item) => (
                <tr key={item.round}>
                  <th scope="row">{count(item.round)}</th>
                  <td>
                    <span class="swatch" style={{ background: `var(--outcome-${item.outcome})` }} aria-hidden="true">
                      {MARKS[item.outcome] ?? ""}
                    </span>{" "}
                    {OUTCOME_WORDS[item.outcome]}
                  </td>
                  <td>{plain(item.role)}</td>
                  <td>{number(item.weight)}</td>
                  <td>{count(item.staleness)}</td>
                  <td>{number(item.train_loss)}</td>
                  <td>{count(item.num_examples)}</td>
                  <td>{seconds(item.train_seconds)}</td>
                  <td>{number(item.update_norm)}</td>
                  <td class="wrap">{item.reason && <bdi>{plain(item.reason.slice(0, 400))}</bdi>}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </Section>
  );
}
