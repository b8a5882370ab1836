/** Who took part when: clients x rounds on one canvas, by pointer and by keyboard. */

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import type { RowOrder } from "../api/participation";
import { savePng } from "../lib/download";
import { count, plain } from "../lib/format";
import { draw, EDGE, FOOT, GUTTER } from "../lib/heat-draw";
import type { HeatImage } from "../lib/heat-image";
import type { Cell, Totals, View } from "../lib/heat-view";
import { cellAt, clamped, columns, isWhole, panned, revealing, rows, shows, whole, zoomed } from "../lib/heat-view";
import { useTheme } from "../lib/palette";
import { useWidth } from "../lib/size";
import { HeatLegend } from "./heat-legend";
import { HeatTip } from "./heat-tip";
import { useHeatImage } from "./use-heat-image";

interface Props {
  run: string;
  totals: Totals;
  order: RowOrder;
  /** What part is shown; null for all of it, new rounds included. */
  view: View | null;
  onView: (view: View | null) => void;
  onOpen: (client: string) => void;
  /** One of several: lower, and without legend and buttons. */
  compact?: boolean;
  /** Whose participation it is, where there are several. */
  name?: string;
}

type Drag = { x: number; y: number; view: View };

export function HeatMap({ run, totals, order, view, onView, onOpen, compact = false, name }: Props) {
  const { colours } = useTheme();
  const box = useRef<HTMLDivElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const drag = useRef<Drag | null>(null);
  const [cell, setCell] = useState<Cell | null>(null);
  const [dragged, setDragged] = useState<View | null>(null);
  const width = Math.max(0, useWidth(box) - GUTTER - EDGE);
  const height = Math.round(Math.min(compact ? 180 : 460, Math.max(96, totals.clients * 14)));
  const now = useMemo(() => dragged ?? (view ? clamped(view, totals) : whole(totals)), [dragged, view, totals]);
  const { image, version } = useHeatImage({
    run,
    order,
    totals,
    view: now,
    follow: view == null && dragged == null,
    width,
    height,
    colours,
  });
  const show = (next: View) => onView(isWhole(next, totals) ? null : next);

  useEffect(() => {
    const frame = requestAnimationFrame(() => {
      if (!canvas.current || !image || width === 0) return;
      paint(canvas.current, image, now, cell, width, height, colours);
      canvas.current.dataset["sharp"] = String(shows(image.layout, now, totals, width, height));
    });
    return () => cancelAnimationFrame(frame);
  }, [image, version, now, cell, width, height, colours]);

  const at = (event: MouseEvent): Cell | null => {
    const edge = canvas.current?.getBoundingClientRect();
    return edge ? cellAt(now, event.clientX - edge.left - GUTTER, event.clientY - edge.top, width, height) : null;
  };
  const middle = (): Cell => cell ?? { row: (now.top + now.bottom) / 2, round: (now.first + now.last) / 2 };
  const start = (): Cell => ({ row: now.top, round: now.last });
  const move = (down: number, right: number) => {
    const from = cell ?? start();
    const next = {
      row: Math.max(0, Math.min(totals.clients - 1, from.row + down)),
      round: Math.max(1, Math.min(totals.rounds, from.round + right)),
    };
    setCell(next);
    const seen = revealing(now, totals, next);
    if (seen !== now) show(seen);
  };
  const keys = (event: KeyboardEvent) => {
    const [step, screen] = [event.shiftKey ? 10 : 1, Math.max(1, rows(now) - 1)];
    // One step is never less than what can be seen: where cells share a pixel, a block of them.
    const [down, right] = [step * (image?.layout.row_step ?? 1), step * (image?.layout.column_step ?? 1)];
    const actions: Record<string, () => void> = {
      ArrowUp: () => move(-down, 0),
      ArrowDown: () => move(down, 0),
      ArrowLeft: () => move(0, -right),
      ArrowRight: () => move(0, right),
      PageUp: () => move(-screen, 0),
      PageDown: () => move(screen, 0),
      Home: () => move(0, -totals.rounds),
      End: () => move(0, totals.rounds),
      "+": () => show(zoomed(now, totals, 0.5, middle())),
      "-": () => show(zoomed(now, totals, 2, middle())),
      "0": () => onView(null),
      Escape: () => setCell(null),
      Enter: () => open(cell),
    };
    const action = actions[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  };
  const open = (chosen: Cell | null) => {
    const client = chosen && image?.client(chosen.row);
    if (client) onOpen(client);
  };

  useEffect(() => {
    const target = canvas.current;
    if (!target) return;
    const wheel = (event: WheelEvent) => {
      const next = wheeled(event, now, totals, at(event));
      if (!next || same(next, now)) return; // At the edge the page scrolls on.
      event.preventDefault();
      show(next);
    };
    target.addEventListener("wheel", wheel, { passive: false });
    return () => target.removeEventListener("wheel", wheel);
  });

  const pointer = {
    onPointerDown: (event: PointerEvent) => {
      if (event.button !== 0) return;
      canvas.current?.setPointerCapture(event.pointerId);
      drag.current = { x: event.clientX, y: event.clientY, view: now };
    },
    onPointerMove: (event: PointerEvent) => {
      const start = drag.current;
      if (!start) return setCell(at(event));
      const byRows = ((start.y - event.clientY) / height) * rows(start.view);
      const byRounds = ((start.x - event.clientX) / width) * columns(start.view);
      setDragged(panned(start.view, totals, byRows, byRounds));
    },
    onPointerUp: (event: PointerEvent) => {
      const start = drag.current;
      drag.current = null;
      if (dragged) show(dragged);
      setDragged(null);
      if (start && Math.hypot(event.clientX - start.x, event.clientY - start.y) < 4) open(at(event));
    },
    onPointerLeave: () => !drag.current && setCell(null),
    onPointerCancel: () => {
      drag.current = null;
      setDragged(null);
    },
  };

  const told = `Participation of ${count(totals.clients)} clients in ${count(totals.rounds)} rounds${name ? ` of ${plain(name)}` : ""}`;
  return (
    <div class="heat">
      {!compact && (
        <div class="heat-tools">
          <HeatLegend overview={image != null && !image.exact} />
          <span class="grow" />
          <button type="button" aria-label="Zoom in" onClick={() => show(zoomed(now, totals, 0.5, middle()))}>
            +
          </button>
          <button type="button" aria-label="Zoom out" onClick={() => show(zoomed(now, totals, 2, middle()))}>
            −
          </button>
          <button type="button" disabled={view == null} onClick={() => onView(null)}>
            Show all
          </button>
          <button type="button" onClick={() => canvas.current && savePng(canvas.current, told, colours.background)}>
            PNG
          </button>
        </div>
      )}
      <div
        ref={box}
        class="heat-box"
        tabIndex={0}
        role="application"
        aria-roledescription="heat map"
        aria-label={`${told}. Arrow keys move from cell to cell, Enter opens the client.`}
        onKeyDown={keys}
        onFocus={() => setCell((old) => old ?? start())}
        onBlur={() => setCell(null)}
      >
        <canvas ref={canvas} style={{ width: `${width + GUTTER + EDGE}px`, height: `${height + FOOT}px` }} {...pointer} />
        {cell && image && <HeatTip run={run} image={image} cell={cell} view={now} width={width} height={height} />}
      </div>
      <p class="note axis">
        clients {count(now.top + 1)}–{count(now.bottom + 1)} of {count(totals.clients)} · rounds {count(now.first)}–
        {count(now.last)} of {count(totals.rounds)}
        {!compact && " · drag or scroll to move, Ctrl + scroll to zoom"}
      </p>
    </div>
  );
}

function paint(
  canvas: HTMLCanvasElement,
  image: HeatImage,
  view: View,
  cell: Cell | null,
  width: number,
  height: number,
  colours: Parameters<typeof draw>[0]["colours"],
): void {
  const ratio = devicePixelRatio || 1;
  const [w, h] = [Math.round((width + GUTTER + EDGE) * ratio), Math.round((height + FOOT) * ratio)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const pen = canvas.getContext("2d");
  if (!pen) return;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  const calls = draw({ pen, width, height, view, colours, cell }, image);
  // Said where a test can read it: what the last frame and all frames together have cost.
  canvas.dataset["calls"] = String(calls);
  canvas.dataset["frames"] = String(Number(canvas.dataset["frames"] ?? 0) + 1);
  canvas.dataset["painted"] = String(image.painted);
  canvas.dataset["view"] = `${view.top}:${view.bottom},${view.first}:${view.last}`;
  canvas.dataset["steps"] = `${image.layout.row_step}x${image.layout.column_step}`;
}

/** The view after a turn of the wheel; null where it is not for the map. */
function wheeled(event: WheelEvent, view: View, totals: Totals, at: Cell | null): View | null {
  if (event.ctrlKey) return at && zoomed(view, totals, event.deltaY > 0 ? 1.25 : 0.8, at);
  const [across, along] = event.shiftKey ? [event.deltaY || event.deltaX, 0] : [event.deltaX, event.deltaY];
  const step = (delta: number, size: number) => Math.sign(delta) * Math.max(1, Math.round((Math.abs(delta) / 800) * size));
  return panned(view, totals, along ? step(along, rows(view)) : 0, across ? step(across, columns(view)) : 0);
}

function same(a: View, b: View): boolean {
  return a.top === b.top && a.bottom === b.bottom && a.first === b.first && a.last === b.last;
}
