/** uPlot set up as the page wants its charts: palette, axes, zoom, gaps. */

import uPlot from "uplot";
import type { Palette } from "./palette";
import { seriesStyle } from "./palette";
import type { Values } from "./series";
import { positive, stacked } from "./series";

export interface Line {
  label: string;
  values: Values;
  /** Which colour and dash; its place in the list when left out. */
  style?: number;
  /** A colour of its own, where it has a meaning elsewhere too. */
  colour?: string;
}

export interface PlotOptions {
  width: number;
  height: number;
  lines: readonly Line[];
  colours: Palette;
  xLabel: string;
  xFormat: (value: number) => string;
  format: (value: number) => string;
  log: boolean;
  stack: boolean;
  join: boolean;
  sync: string | null;
  onZoom: (window: [number, number] | null) => void;
  onCursor: (index: number | null) => void;
}

const FONT = "12px system-ui, sans-serif";

export function plotData(x: readonly number[], lines: readonly Line[], log: boolean, stack: boolean): uPlot.AlignedData {
  const columns = lines.map((line) => line.values);
  // Of a stack the highest sum is drawn first and the lower ones over it.
  const drawn = stack ? stacked(columns).reverse() : log ? columns.map(positive) : columns;
  return [x, ...drawn] as unknown as uPlot.AlignedData;
}

export function plotOptions(options: PlotOptions): uPlot.Options {
  const { colours, lines, stack } = options;
  const order = stack ? [...lines].reverse() : [...lines];
  return {
    width: options.width,
    height: options.height,
    legend: { show: false },
    padding: [10, 22, 0, 0],
    scales: { x: { time: false }, y: { distr: options.log ? 3 : 1, ...(stack ? { range: fromZero } : {}) } },
    cursor: {
      drag: { x: true, y: false, setScale: false },
      points: { size: 6 },
      ...(options.sync ? { sync: { key: options.sync, setSeries: false } } : {}),
      bind: {
        dblclick: () => () => {
          options.onZoom(null);
          return null;
        },
      },
    },
    axes: [
      { ...axis(colours), label: options.xLabel, labelSize: 16, labelGap: -4, labelFont: FONT, size: 32, values: (_, ticks) => ticks.map(options.xFormat) },
      { ...axis(colours), size: axisWidth, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : short(options.format(tick)))) },
    ],
    series: [{}, ...order.map((line) => drawnLine(line, lines.indexOf(line), options))],
    hooks: {
      setSelect: [
        (plot) => {
          const { left, width } = plot.select;
          if (width < 4) return;
          options.onZoom([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")]);
          plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        },
      ],
      setCursor: [(plot) => options.onCursor(plot.cursor.idx ?? null)],
    },
  };
}

function drawnLine(line: Line, index: number, { colours, stack, join }: PlotOptions): uPlot.Series {
  const { colour: usual, dash } = seriesStyle(colours, line.style ?? index);
  const colour = line.colour ?? usual;
  return {
    label: line.label,
    stroke: colour,
    width: stack ? 1 : 1.75,
    ...(stack ? { fill: colour, paths: columns } : { dash }),
    points: stack ? { show: false } : { size: 5 },
    spanGaps: join,
  };
}

/** Bars while there is one per round and room for it, a filled outline beyond. */
const MOST_BARS = 600;
const bars = uPlot.paths.bars?.({ size: [0.94, Infinity] });
const outline = uPlot.paths.stepped?.({ align: 1 });
const columns: uPlot.Series.PathBuilder = (plot, ...rest) =>
  (plot.data[0].length <= MOST_BARS ? bars : outline)?.(plot, ...rest) ?? null;

/** A tick without the decimals that say nothing: 80 % rather than 80.0 %. */
function short(text: string): string {
  return text.replace(/\.0(?= |$)/, "");
}

function fromZero(_: uPlot, __: number, high: number): uPlot.Range.MinMax {
  return [0, high > 0 ? high * 1.05 : 1];
}

function axis(colours: Palette): uPlot.Axis {
  return {
    stroke: colours.ink,
    font: FONT,
    grid: { stroke: colours.grid, width: 1 },
    ticks: { stroke: colours.grid, width: 1, size: 4 },
    gap: 4,
  };
}

/** As wide as the longest number that stands at the axis. */
function axisWidth(_: uPlot, values: string[] | null): number {
  const longest = Math.max(...(values ?? [""]).map((value) => value?.length ?? 0));
  return Math.max(40, 14 + 6.6 * longest);
}
