/** One run: its headline, and a tab for each question. */

import { useEffect, useState } from "preact/hooks";
import type { RunDetail, RunSummary } from "../api/client";
import { api } from "../api/client";
import { useLoad } from "../api/load";
import { ExportMenu } from "../components/export-menu";
import { Name, Pending, Status, Tile, When } from "../components/parts";
import { bytes, count, metric, percent, plain, seconds, title } from "../lib/format";
import { useLive } from "../live";
import { address } from "../router";
import { ClientView } from "./client";
import { RunClients } from "./run-clients";
import { RunConfig } from "./run-config";
import { RunDiagnostics } from "./run-diagnostics";
import { RunEvents } from "./run-events";
import { RunOverview } from "./run-overview";
import { RunRounds } from "./run-rounds";

const TABS = [
  ["", "Overview"],
  ["rounds", "Rounds"],
  ["clients", "Clients"],
  ["diagnostics", "Diagnostics"],
  ["config", "Config"],
  ["events", "Events"],
] as const;

export interface TabProps {
  run: RunDetail;
  query: URLSearchParams;
}

export function RunPage({ id, query }: { id: string; query: URLSearchParams }) {
  const run = useRun(id);
  const tab = query.get("tab") ?? "";
  const client = query.get("client");
  useEffect(() => {
    document.title = `${run.data ? plain(run.data.name) : id} · Turnout`;
  }, [run.data?.name]);
  // The heading stays the same element while the run loads: it has the focus.
  const heading = (
    <div class="title">
      <h1 tabIndex={-1}>{run.data ? <Name text={run.data.name} /> : `Run ${plain(id)}`}</h1>
      {run.data && <Title run={run.data} />}
    </div>
  );
  if (!run.data) {
    return (
      <>
        {heading}
        <Pending error={run.error} retry={run.reload} />
        {run.error?.status === 404 && <a href="?">See all runs.</a>}
      </>
    );
  }
  return (
    <>
      {heading}
      <Headline run={run.data} />
      <nav class="tabs" aria-label="Parts of the run">
        {TABS.map(([name, words]) => (
          <a
            key={name}
            href={address({ page: "run", run: id, tab: name })}
            aria-current={tab === name ? "page" : undefined}
          >
            {words}
          </a>
        ))}
      </nav>
      {client ? <ClientView key={client} run={run.data} client={client} query={query} /> : <Tab tab={tab} run={run.data} query={query} />}
    </>
  );
}

function Tab({ tab, ...props }: { tab: string } & TabProps) {
  if (tab === "rounds") return <RunRounds {...props} />;
  if (tab === "clients") return <RunClients {...props} />;
  if (tab === "diagnostics") return <RunDiagnostics {...props} />;
  if (tab === "config") return <RunConfig {...props} />;
  if (tab === "events") return <RunEvents {...props} />;
  return <RunOverview {...props} />;
}

/** The run in full, with what the stream says of it laid over. */
function useRun(id: string) {
  const loaded = useLoad<RunDetail>(api(`runs/${encodeURIComponent(id)}`), 2_000);
  const [fresh, setFresh] = useState<RunSummary | null>(null);
  useLive({
    update: ({ runs }) => {
      const mine = runs.find((run) => run.id === id);
      if (!mine) return;
      setFresh(mine);
      loaded.reload();
    },
    resync: () => {
      setFresh(null);
      loaded.reload();
    },
  });
  const newer = fresh && loaded.data && fresh.heartbeat_at >= loaded.data.heartbeat_at;
  const data = loaded.data && newer ? { ...loaded.data, ...fresh } : loaded.data;
  return { ...loaded, data };
}

/** What trains besides the strategy: the adapter, and an optimizer other than SGD. */
function methods(config: RunDetail["config"]): string {
  const named = (section: string, key: string) => (config[section] as Record<string, unknown> | null | undefined)?.[key];
  const [adapter, optimizer] = [named("peft", "name"), named("client", "optimizer")];
  const words = [adapter && `adapter ${String(adapter)}`, optimizer && optimizer !== "sgd" && `optimizer ${String(optimizer)}`];
  return words.filter(Boolean).join(", ");
}

function Title({ run }: { run: RunDetail }) {
  const also = methods(run.config);
  return (
    <>
      <Status status={run.status} />
      <span class="note">
        <Name text={run.strategy} /> on <Name text={run.task} />
        {also && (
          <>
            {" · "}
            <Name text={also} />
          </>
        )}{" "}
        · seed {run.seed} · <code>{run.id}</code> · started{" "}
        <When at={run.created_at} />
      </span>
      <span class="grow" />
      <a class="button" href={address({ page: "compare", runs: run.id })}>
        Compare
      </a>
      <ExportMenu run={run} />
    </>
  );
}

function Headline({ run }: { run: RunDetail }) {
  const best = run.headline;
  const { totals } = run;
  const expected = totals.invited > 0 ? totals.participants / totals.invited : null;
  return (
    <>
      {run.error_text && (
        <details class="failure" open={run.error_text.length < 200}>
          <summary>{plain(run.error ?? "failed")}</summary>
          <pre>{run.error_text.split("\n").map(plain).join("\n")}</pre>
        </details>
      )}
      <dl class="tiles">
        <Tile label="Round" note={run.num_rounds > 0 ? percent(run.rounds_done / run.num_rounds, 0) : undefined}>
          {count(run.rounds_done)} / {count(run.num_rounds)}
        </Tile>
        {best && (
          <Tile label={`${title(best.name)}, last`} note={`round ${count(best.last_round)}`}>
            {metric(best.name, best.last)}
          </Tile>
        )}
        {best && (
          <Tile label={`${title(best.name)}, best`} note={`round ${count(best.best_round)}`}>
            {metric(best.name, best.best)}
          </Tile>
        )}
        <Tile label="Replies taken" note={expected == null ? undefined : `${percent(expected, 0)} of those asked`}>
          {count(totals.participants)}
        </Tile>
        <Tile label="Replies lost" note="failed, rejected, missing">
          {count(totals.failed)} · {count(totals.rejected)} · {count(totals.missing)}
        </Tile>
        <Tile label="Model bytes" note={totals.sent_bytes == null ? "not counted in a simulation" : "to · from clients"}>
          {totals.sent_bytes == null ? "–" : `${bytes(totals.sent_bytes)} · ${bytes(totals.received_bytes)}`}
        </Tile>
        <Tile label="Time in rounds" note={run.median_round_seconds == null ? undefined : `${seconds(run.median_round_seconds)} a round`}>
          {seconds(run.seconds)}
        </Tile>
        {run.status === "running" && (
          <Tile label="Left, about" note="from the last rounds">
            {seconds(run.eta_seconds)}
          </Tile>
        )}
      </dl>
    </>
  );
}
