/** The clients of a run: how each takes part and counts, on what it runs, and whether the model serves all. */

import { usePages } from "../api/pages";
import type { ClientSummary, RunDetail } from "../api/client";
import { api } from "../api/client";
import { Fairness } from "../components/fairness";
import { Name, Pending, Section } from "../components/parts";
import type { TableColumn } from "../components/virtual-table";
import { VirtualTable } from "../components/virtual-table";
import { bytes, count, number, percent, plural, seconds, UNKNOWN } from "../lib/format";
import { useLive } from "../live";
import { address, set } from "../router";
import type { TabProps } from "./run";

export function RunClients({ run, query }: TabProps) {
  return (
    <>
      <ClientTable run={run} query={query} />
      <Fairness run={run} query={query} />
    </>
  );
}

function ClientTable({ run, query }: TabProps) {
  const [sort, order, q] = [query.get("sort") ?? "client", query.get("order") ?? "asc", query.get("q") ?? ""];
  const url = (limit: number, offset: number) => api(`runs/${run.id}/clients`, { q, sort, order, limit, offset });
  const clients = usePages<ClientSummary>(url(0, 0), url, 2_000);
  useLive({
    update: ({ rounds }) => rounds.some((one) => one.run === run.id) && clients.reload(),
    resync: clients.reload,
  });
  const search = (
    <label class="search">
      <span class="hidden">Search clients</span>
      <input
        type="search"
        placeholder="Id, name or device"
        value={q}
        onInput={(event) => set({ q: event.currentTarget.value })}
      />
    </label>
  );
  return (
    <Section id="clients" title="Clients" tools={search}>
      {clients.total == null && <Pending error={clients.error} retry={clients.reload} />}
      {clients.total === 0 && <p class="empty">{q ? "No client matches." : "No client is known yet."}</p>}
      {clients.total != null && clients.total > 0 && (
        <>
          <VirtualTable
            label="Clients, table"
            total={clients.total}
            columns={columnsOf(run)}
            row={clients.row}
            onSight={clients.want}
            sort={sort}
            order={order}
            onSort={(by, way) => set({ sort: by, order: way })}
          />
          <p class="note">
            {plural(clients.total, "client")}. Stale: rounds since the last reply (longest absence). Weight: times an equal
            share. {UNKNOWN}: not reported.
          </p>
        </>
      )}
    </Section>
  );
}

function columnsOf({ id, num_clients, totals, rounds_done }: RunDetail): TableColumn<ClientSummary>[] {
  const numeric = true;
  // Who counts bytes is a fleet, whose nodes say what they run on; clients of a simulation do not.
  const nodes = totals.sent_bytes != null || rounds_done === 0;
  const columns: (TableColumn<ClientSummary> & { node?: boolean })[] = [
    {
      key: "client",
      words: "Client",
      sort: "client",
      cell: (row) => (
        <a href={address({ page: "run", run: id, tab: "clients", client: row.client })}>{row.client}</a>
      ),
    },
    { key: "name", node: true, words: "Name", cell: (row) => (row.name ? <Name text={row.name} /> : UNKNOWN) },
    { key: "part", words: "Took part", sort: "participation", numeric, about: "Share of the rounds in which its reply was taken.", cell: (row) => percent(row.participation, 0) },
    { key: "stale", words: "Stale", sort: "staleness", numeric, about: "Rounds since its last reply; in brackets the longest absence.", cell: (row) => `${count(row.staleness)} (${count(row.max_staleness)})` },
    { key: "last", words: "Last seen", numeric, about: "Last round in which its reply was taken.", cell: (row) => (row.last_round == null ? "never" : count(row.last_round)) },
    { key: "weight", words: "Weight", sort: "weight-share", numeric, about: "Its part of all weight, beside an equal share.", cell: (row) => <Weight share={row.weight_share} clients={num_clients} /> },
    { key: "trouble", words: "Replies lost", sort: "failures", numeric, about: "Failed, rejected and missing replies.", cell: (row) => count(row.failed + row.rejected + row.missing) },
    { key: "examples", words: "Examples", sort: "num-examples", numeric, cell: (row) => count(row.examples) },
    { key: "loss", words: "Loss", sort: "train-loss", numeric, cell: (row) => number(row.train_loss) },
    { key: "accuracy", words: "Accuracy", sort: "accuracy", numeric, cell: (row) => percent(row.accuracy) },
    { key: "seconds", words: "Training", sort: "train-seconds", numeric, about: "Mean over its replies.", cell: (row) => seconds(row.train_seconds) },
    { key: "speed", node: true, words: "Examples/s", sort: "samples-per-second", numeric, cell: (row) => count(row.samples_per_second) },
    { key: "norm", words: "Update norm", sort: "update-norm", numeric, cell: (row) => number(row.update_norm) },
    { key: "device", node: true, words: "Device", cell: (row) => (row.device ? <Name text={row.device} /> : UNKNOWN) },
    { key: "memory", node: true, words: "Memory", sort: "memory-bytes", numeric, cell: (row) => bytes(row.memory_bytes) },
    { key: "gpu-memory", node: true, words: "GPU memory", sort: "gpu-memory-bytes", numeric, cell: (row) => bytes(row.gpu_memory_bytes) },
    { key: "gpu", node: true, words: "GPU use", sort: "gpu-utilization", numeric, cell: (row) => percent(row.gpu_utilization, 0) },
  ];
  return columns.filter((column) => nodes || !column.node);
}

/** A client's share of the weight as a multiple of the equal share. */
function Weight({ share, clients }: { share: number | null; clients: number }) {
  if (share == null) return <>{UNKNOWN}</>;
  return (
    <span title={`${percent(share, 2)} of all weight; an equal share is ${percent(1 / clients, 2)}`}>
      {(share * clients).toFixed(2)} ×
    </span>
  );
}
