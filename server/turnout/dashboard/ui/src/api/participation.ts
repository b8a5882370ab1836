/** The participation matrix and single cells of it. */

import type { ClientRoundItem, ClientRoundPage, ParticipationLayout } from "./client";
import { api, get, request } from "./client";
import type { Request } from "../lib/heat-view";

const KEPT = 400;
const cells = new Map<string, ClientRoundItem>();

/** What rows can be sorted by, and which way round is useful: the ones to worry about first. */
export const ROW_ORDERS = {
  client: ["id", "asc"],
  participation: ["participation", "desc"],
  "last-round": ["last seen", "desc"],
  weight: ["weight", "desc"],
  failures: ["troubles", "desc"],
} as const;

export type RowOrder = keyof typeof ROW_ORDERS;

/** Loads cells and layout of a window. They are asked for side by side; a round may end in between. */
export async function loadParticipation(
  run: string,
  sort: RowOrder,
  window: Request,
  signal: AbortSignal,
): Promise<{ layout: ParticipationLayout; bytes: Uint8Array }> {
  const query = {
    rounds: `${window.first}:${window.last}`,
    clients: `${window.top}:${window.bottom}`,
    rows: Math.min(window.maxRows, 4_000),
    columns: Math.min(window.maxColumns, 4_000),
    sort,
    order: ROW_ORDERS[sort][1],
  };
  const path = `runs/${encodeURIComponent(run)}/participation`;
  const [layout, answer] = await Promise.all([
    get<ParticipationLayout>(api(`${path}/layout`, query), signal),
    request(api(path, query), { signal }),
  ]);
  const bytes = new Uint8Array(await answer.arrayBuffer());
  if (bytes.length !== layout.rows * layout.columns * layout.planes) {
    return loadParticipation(run, sort, window, signal);
  }
  return { layout, bytes };
}

/** What one client did in one round; null when it was not asked. Committed rounds do not change: kept. */
export async function clientRound(
  run: string,
  client: string,
  round: number,
  signal: AbortSignal,
): Promise<ClientRoundItem | null> {
  const name = `${run} ${client} ${round}`;
  const known = cells.get(name);
  if (known) return known;
  const url = api(`runs/${encodeURIComponent(run)}/clients/${client}/rounds`, {
    after: round - 1,
    limit: 1,
    order: "asc",
  });
  const item = (await get<ClientRoundPage>(url, signal)).items[0];
  if (item?.round !== round) return null;
  if (cells.size >= KEPT) cells.delete(cells.keys().next().value ?? "");
  cells.set(name, item);
  return item;
}
