/** A line chart: cursor with values, zoom, keyboard, the same numbers as a table, and itself as a PNG. */

import { useEffect, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { savePng } from "../lib/download";
import type { Num } from "../lib/format";
import { plain } from "../lib/format";
import { useTheme } from "../lib/palette";
import type { Line } from "../lib/plot";
import { plotData, plotOptions } from "../lib/plot";
import { valueAt } from "../lib/series";
import { useWidth } from "../lib/size";
import { ChartLegend } from "./chart-legend";
import { ChartTable } from "./chart-table";

export interface ChartProps {
  title: string;
  x: readonly number[];
  lines: readonly Line[];
  xLabel: string;
  xFormat?: (value: number) => string;
  format: (value: Num) => string;
  log?: boolean;
  stack?: boolean;
  /** Draw through missing values: where several runs share an axis, most values of each are missing. */
  join?: boolean;
  height?: number;
  zoom?: [number, number] | null;
  onZoom?: (window: [number, number] | null) => void;
  sync?: string;
}

const asIs = (value: number) => value.toLocaleString("en-GB");

export function Chart(props: ChartProps) {
  const { x, lines, title, log = false, stack = false, join = false, height = 240, zoom = null, xFormat = asIs } = props;
  const { colours } = useTheme();
  const box = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const width = useWidth(box);
  const [cursor, setCursor] = useState<number | null>(null);
  const [off, setOff] = useState<ReadonlySet<string>>(new Set());
  const shown = lines.filter((line) => !off.has(line.label));
  const newest = useRef(props);
  newest.current = props;

  const shape = shown.map((line) => `${line.label} ${line.style ?? lines.indexOf(line)} ${line.colour ?? ""}`).join("\n");
  useEffect(() => {
    if (!box.current || width === 0 || shown.length === 0) return;
    const options = plotOptions({
      width,
      height,
      lines: shown.map((line) => ({ ...line, style: line.style ?? lines.indexOf(line) })),
      colours,
      xLabel: props.xLabel,
      xFormat: (value) => (newest.current.xFormat ?? asIs)(value),
      format: (value) => newest.current.format(value),
      log,
      stack,
      join,
      sync: props.sync ?? null,
      onZoom: (window) => newest.current.onZoom?.(window),
      onCursor: setCursor,
    });
    plot.current = new uPlot(options, plotData(x, shown, log, stack), box.current);
    fit(plot.current, x, zoom, stack);
    return () => {
      plot.current?.destroy();
      plot.current = null;
    };
  }, [shape, colours, log, stack, join, height, width === 0, props.xLabel, props.sync]);

  useEffect(() => {
    if (width > 0) plot.current?.setSize({ width, height });
  }, [width, height]);

  useEffect(() => {
    if (!plot.current) return;
    plot.current.setData(plotData(x, shown, log, stack), false);
    fit(plot.current, x, zoom, stack);
  }, [x, lines, off, zoom?.[0], zoom?.[1]]);

  const keys = (event: KeyboardEvent) => {
    const at = plot.current?.cursor.idx ?? x.length - 1;
    const step = event.shiftKey ? 10 : 1;
    const actions: Record<string, () => void> = {
      ArrowLeft: () => point(plot.current, x, at - step),
      ArrowRight: () => point(plot.current, x, at + step),
      "+": () => props.onZoom?.(scaled(x, zoom, at, 0.5)),
      "-": () => props.onZoom?.(scaled(x, zoom, at, 2)),
      "0": () => props.onZoom?.(null),
    };
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  };

  const where = cursor != null && x[cursor] != null ? `${props.xLabel} ${xFormat(x[cursor])}` : "";
  return (
    <figure class="chart">
      <figcaption>
        <ChartLegend
          lines={lines}
          off={off}
          colours={colours}
          stack={stack}
          value={(line) => props.format(valueAt(line.values, cursor))}
          toggle={(label) => setOff(toggled(off, label))}
        />
        <span class="note where">{where}</span>
      </figcaption>
      <div
        ref={box}
        class="plot"
        style={{ minHeight: `${height}px` }}
        tabIndex={0}
        role="img"
        aria-roledescription="chart"
        aria-label={spoken(title, shown, props.format)}
        onKeyDown={keys}
      />
      <div class="chart-tools">
        {zoom && (
          <button type="button" onClick={() => props.onZoom?.(null)}>
            Show all
          </button>
        )}
        <button type="button" onClick={() => plot.current && savePng(plot.current.ctx.canvas, title, colours.background)}>
          PNG
        </button>
        <ChartTable title={title} xLabel={props.xLabel} x={x} xFormat={xFormat} lines={lines} format={props.format} />
      </div>
    </figure>
  );
}

/** Shows `zoom`, or everything; a bar needs half a round more on each side. */
function fit(plot: uPlot, x: readonly number[], zoom: [number, number] | null, stack: boolean): void {
  const room = stack ? 0.5 : 0;
  const [low, high] = zoom ?? [(x[0] ?? 0) - room, (x.at(-1) ?? 1) + room];
  plot.setScale("x", { min: low, max: high > low ? high : low + 1 });
}

function point(plot: uPlot | null, x: readonly number[], index: number): void {
  const at = x[Math.max(0, Math.min(index, x.length - 1))];
  if (plot && at != null) plot.setCursor({ left: plot.valToPos(at, "x"), top: plot.over.clientHeight / 2 });
}

function scaled(x: readonly number[], zoom: [number, number] | null, at: number, by: number): [number, number] | null {
  const [first, last] = [x[0] ?? 0, x.at(-1) ?? 1];
  const [low, high] = zoom ?? [first, last];
  const middle = Math.max(low, Math.min(x[at] ?? high, high));
  const half = ((high - low) * by) / 2;
  const next: [number, number] = [Math.max(first, middle - half), Math.min(last, middle + half)];
  return next[0] <= first && next[1] >= last ? null : next;
}

function toggled(off: ReadonlySet<string>, label: string): ReadonlySet<string> {
  const next = new Set(off);
  if (!next.delete(label)) next.add(label);
  return next;
}

function spoken(title: string, lines: readonly Line[], format: (value: Num) => string): string {
  const ends = lines.map((line) => `${plain(line.label)} ${format(valueAt(line.values, null))}`);
  return `${plain(title)}. Last values: ${ends.join(", ")}.`;
}
