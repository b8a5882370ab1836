/** What one cell says: client, round, outcome, and once it is known weight and staleness. */

import { useEffect, useState } from "preact/hooks";
import type { ClientRoundItem } from "../api/client";
import { clientRound } from "../api/participation";
import { count, number, percent, plain, plural, seconds } from "../lib/format";
import { GUTTER } from "../lib/heat-draw";
import type { HeatImage } from "../lib/heat-image";
import type { Cell, View } from "../lib/heat-view";
import { columns, rows } from "../lib/heat-view";
import { OUTCOME_WORDS } from "./heat-legend";

interface Props {
  run: string;
  image: HeatImage;
  cell: Cell;
  view: View;
  width: number;
  height: number;
}

const WIDTH = 250;

export function HeatTip({ run, image, cell, view, width, height }: Props) {
  const found = image.at(cell.row, cell.round);
  const client = image.client(cell.row);
  const asked = image.exact && found != null && found.outcome !== "absent";
  const detail = useDetail(run, asked ? client : null, cell.round);
  const x = GUTTER + ((cell.round - view.first + 1) / columns(view)) * width + 8;
  const y = Math.min(height - 60, ((cell.row - view.top + 1) / rows(view)) * height + 4);
  const left = x + WIDTH > width + GUTTER ? Math.max(0, x - WIDTH - (width / columns(view)) - 16) : x;
  if (!found || client == null) return null;
  return (
    <div class="tip" role="status" style={{ left: `${left}px`, top: `${Math.max(0, y)}px`, width: `${WIDTH}px` }}>
      {image.exact ? (
        <>
          <strong>client {client}</strong> · round {count(cell.round)}
          <br />
          {OUTCOME_WORDS[found.outcome] ?? found.outcome}
          {found.role && ` (${plain(found.role)})`}
          {detail && <Detail item={detail} />}
        </>
      ) : (
        <Shared image={image} cell={cell} client={client} found={found} />
      )}
    </div>
  );
}

function Shared({ image, cell, client, found }: { image: HeatImage; cell: Cell; client: string; found: { outcome: string; share: number | null } }) {
  const { layout } = image;
  const first = layout.first_round + Math.floor((cell.round - layout.first_round) / layout.column_step) * layout.column_step;
  const last = Math.min(first + layout.column_step - 1, layout.last_round);
  return (
    <>
      <strong>{layout.row_step > 1 ? `${plural(layout.row_step, "client")} from client ${client}` : `client ${client}`}</strong>
      {" · "}
      {first === last ? `round ${count(first)}` : `rounds ${count(first)}–${count(last)}`}
      <br />
      took part in {percent(found.share, 0)} of these cells
      {!["absent", "ok"].includes(found.outcome) && `; worst: ${OUTCOME_WORDS[found.outcome]}`}
      <br />
      <span class="note">zoom in for single cells</span>
    </>
  );
}

function Detail({ item }: { item: ClientRoundItem }) {
  return (
    <>
      <br />
      weight {number(item.weight)} · {plural(item.staleness, "round")} stale
      <br />
      {plural(item.num_examples, "example")} · loss {number(item.train_loss)} · {seconds(item.train_seconds)}
      {item.reason && (
        <>
          <br />
          <bdi class="reason">{plain(item.reason.slice(0, 160))}</bdi>
        </>
      )}
    </>
  );
}

/** The full record of a cell, once the cursor rests on it. */
function useDetail(run: string, client: string | null, round: number): ClientRoundItem | null {
  const [item, setItem] = useState<ClientRoundItem | null>(null);
  useEffect(() => {
    if (client == null) return;
    const abort = new AbortController();
    const timer = setTimeout(() => {
      clientRound(run, client, round, abort.signal).then(setItem, () => setItem(null));
    }, 120);
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [run, client, round]);
  return item && item.client === client && item.round === round ? item : null;
}
