/** Participation as an image of one pixel per cell; new rounds are painted beside what is there. */

import type { ParticipationLayout } from "../api/client";
import type { Palette } from "./palette";

type Rgb = readonly [number, number, number];

const OK = 1;
const ROOM = 256;

export function rgb(hex: string): Rgb {
  const value = Number.parseInt(hex.slice(1), 16);
  return [(value >> 16) & 255, (value >> 8) & 255, value & 255];
}

/** Colours as little-endian RGBA words: by outcome, and by share of rounds taken part in (0 to 255). */
export function colourTables(colours: Palette, outcomes: readonly string[]): { outcome: Uint32Array; share: Uint32Array } {
  const word = ([r, g, b]: Rgb) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  const absent = rgb(colours.outcomes["absent"] ?? colours.background);
  const ok = rgb(colours.outcomes["ok"] ?? colours.ink);
  const mix = (share: number): Rgb => [0, 1, 2].map((at) => Math.round((absent[at] ?? 0) + (((ok[at] ?? 0) - (absent[at] ?? 0)) * share) / 255)) as unknown as Rgb;
  return {
    outcome: Uint32Array.from(outcomes, (name) => word(rgb(colours.outcomes[name] ?? colours.ink))),
    share: Uint32Array.from({ length: 256 }, (_, share) => word(mix(share))),
  };
}

export class HeatImage {
  readonly canvas: HTMLCanvasElement;
  private stride: number;
  private cells: Uint8Array;
  private worst: Uint8Array | null;
  private readonly tables;
  /** Cells painted so far, for who wants to know that only new ones are. */
  painted = 0;

  constructor(
    public layout: ParticipationLayout,
    bytes: Uint8Array,
    colours: Palette,
  ) {
    const size = layout.rows * layout.columns;
    this.stride = layout.columns;
    this.cells = bytes.subarray(0, size);
    this.worst = layout.planes === 2 ? bytes.subarray(size, 2 * size) : null;
    this.tables = colourTables(colours, layout.outcomes);
    this.canvas = document.createElement("canvas");
    this.canvas.width = Math.max(1, layout.columns + (this.exact ? ROOM : 0));
    this.canvas.height = Math.max(1, layout.rows);
    this.paint(0, layout.columns);
  }

  get exact(): boolean {
    return this.layout.planes === 1;
  }

  /** Whether `next`, an exact window of the same rows, starts where this one ends. */
  continues(next: ParticipationLayout): boolean {
    const { layout } = this;
    return (
      this.exact &&
      next.planes === 1 &&
      next.first_round === layout.last_round + 1 &&
      next.first_client === layout.first_client &&
      next.rows === layout.rows &&
      next.total_clients === layout.total_clients
    );
  }

  /** Adds the columns of new rounds and paints these alone. */
  append(next: ParticipationLayout, bytes: Uint8Array): void {
    const before = this.layout.columns;
    const columns = before + next.columns;
    if (columns > this.stride) this.widen(columns);
    for (let row = 0; row < next.rows; row += 1) {
      this.cells.set(bytes.subarray(row * next.columns, (row + 1) * next.columns), row * this.stride + before);
    }
    this.layout = { ...this.layout, columns, last_round: next.last_round, total_rounds: next.total_rounds };
    if (columns > this.canvas.width) {
      this.canvas.width = columns + ROOM; // Resizing clears a canvas.
      this.paint(0, columns);
    } else {
      this.paint(before, columns);
    }
  }

  private widen(columns: number): void {
    const stride = columns + ROOM;
    const wider = new Uint8Array(stride * this.layout.rows);
    for (let row = 0; row < this.layout.rows; row += 1) {
      wider.set(this.cells.subarray(row * this.stride, row * this.stride + this.layout.columns), row * stride);
    }
    this.cells = wider;
    this.stride = stride;
  }

  private paint(from: number, to: number): void {
    const pen = this.canvas.getContext("2d");
    const [width, height] = [to - from, this.layout.rows];
    if (!pen || width <= 0 || height <= 0) return;
    const image = pen.createImageData(width, height);
    const words = new Uint32Array(image.data.buffer);
    for (let row = 0; row < height; row += 1) {
      for (let column = 0; column < width; column += 1) {
        words[row * width + column] = this.colour(row * this.stride + from + column);
      }
    }
    pen.putImageData(image, from, 0);
    this.painted += width * height;
  }

  private colour(at: number): number {
    const cell = this.cells[at] ?? 0;
    if (!this.worst) return this.tables.outcome[cell & 15] ?? 0;
    const worst = this.worst[at] ?? 0;
    return (worst > OK ? this.tables.outcome[worst] : this.tables.share[cell]) ?? 0;
  }

  /** Outcome (worst outcome in an overview), role and share of one cell; null where nothing is loaded. */
  at(row: number, round: number): { outcome: string; role: string; share: number | null } | null {
    const { layout } = this;
    const y = Math.floor((row - layout.first_client) / layout.row_step);
    const x = Math.floor((round - layout.first_round) / layout.column_step);
    if (x < 0 || y < 0 || x >= layout.columns || y >= layout.rows) return null;
    const cell = this.cells[y * this.stride + x] ?? 0;
    const code = this.worst ? (this.worst[y * this.stride + x] ?? 0) : cell & 15;
    return {
      outcome: layout.outcomes[code] ?? "absent",
      role: this.worst ? "" : (layout.roles[cell >> 4] ?? ""),
      share: this.worst ? cell / 255 : null,
    };
  }

  /** The client of a row; in an overview the first of those that share it. */
  client(row: number): string | null {
    return this.layout.clients[Math.floor((row - this.layout.first_client) / this.layout.row_step)] ?? null;
  }
}
