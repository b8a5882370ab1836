/** Puts the image of a participation matrix on screen: scaled cells, marks, axes, the chosen cell. */

import type { HeatImage } from "./heat-image";
import type { Cell, View } from "./heat-view";
import { columns, rows, ticks } from "./heat-view";
import type { Palette } from "./palette";

export const GUTTER = 64;
export const FOOT = 22;
/** Room for the half of the last round's number. */
export const EDGE = 14;
const LINES_FROM = 5;
const MARKS_FROM = 7;
const LABELS_FROM = 13;
/** A trouble's sign in its cell, for readers who do not see the colours. */
export const MARKS: Record<string, string> = { failed: "×", rejected: "■", missing: "–" };

export interface Scene {
  pen: CanvasRenderingContext2D;
  width: number;
  height: number;
  view: View;
  colours: Palette;
  cell: Cell | null;
}

/** Draws everything; returns how many drawing calls it took, which does not grow with the matrix. */
export function draw(scene: Scene, image: HeatImage): number {
  const { pen, width, height, colours } = scene;
  pen.clearRect(0, 0, width + GUTTER + EDGE, height + FOOT);
  pen.save();
  pen.beginPath();
  pen.rect(GUTTER, 0, width, height);
  pen.clip();
  pen.fillStyle = colours.outcomes["absent"] ?? colours.background;
  pen.fillRect(GUTTER, 0, width, height);
  cells(scene, image);
  let calls = 2;
  if (image.exact) calls += separators(scene) + marks(scene, image);
  pen.restore();
  calls += axes(scene, image);
  if (scene.cell) {
    outline(scene, scene.cell);
    calls += 1;
  }
  return calls;
}

function place(scene: Scene, row: number, round: number): [number, number, number, number] {
  const [w, h] = [scene.width / columns(scene.view), scene.height / rows(scene.view)];
  return [GUTTER + (round - scene.view.first) * w, (row - scene.view.top) * h, w, h];
}

function cells(scene: Scene, image: HeatImage): void {
  const { layout } = image;
  const [x, y, w, h] = place(scene, layout.first_client, layout.first_round);
  const [across, down] = [layout.columns, layout.rows];
  scene.pen.imageSmoothingEnabled = false;
  scene.pen.drawImage(image.canvas, 0, 0, across, down, x, y, across * layout.column_step * w, down * layout.row_step * h);
}

/** Thin lines between cells that are large enough to have them, as one path. */
function separators(scene: Scene): number {
  const { pen, view, width, height } = scene;
  const [, , w, h] = place(scene, 0, 0);
  if (Math.min(w, h) < LINES_FROM) return 0;
  pen.beginPath();
  for (let round = view.first; round <= view.last; round += 1) {
    const [x] = place(scene, 0, round);
    pen.rect(Math.round(x) - 0.5, 0, 1, height);
  }
  for (let row = view.top; row <= view.bottom; row += 1) {
    const [, y] = place(scene, row, 1);
    pen.rect(GUTTER, Math.round(y) - 0.5, width, 1);
  }
  pen.fillStyle = scene.colours.background;
  pen.fill();
  return 1;
}

function marks(scene: Scene, image: HeatImage): number {
  const { pen, view, colours } = scene;
  const [, , w, h] = place(scene, 0, 0);
  if (Math.min(w, h) < MARKS_FROM) return 0;
  let calls = 0;
  pen.font = `bold ${Math.min(16, Math.floor(Math.min(w, h)))}px system-ui, sans-serif`;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.fillStyle = colours.background;
  for (let row = view.top; row <= view.bottom; row += 1) {
    for (let round = view.first; round <= view.last; round += 1) {
      const mark = MARKS[image.at(row, round)?.outcome ?? ""];
      if (!mark) continue;
      const [x, y] = place(scene, row, round);
      pen.fillStyle = mark === "–" ? "#000000" : colours.background;
      pen.fillText(mark, x + w / 2, y + h / 2 + 0.5);
      calls += 1;
    }
  }
  return calls;
}

function axes(scene: Scene, image: HeatImage): number {
  const { pen, view, width, height, colours } = scene;
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = colours.ink;
  pen.textAlign = "center";
  pen.textBaseline = "top";
  let calls = 0;
  for (const round of ticks(view.first, view.last, Math.max(2, Math.floor(width / 80)))) {
    const [x, , w] = place(scene, 0, round);
    pen.fillText(String(round), x + w / 2, height + 6);
    calls += 1;
  }
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  const [, , , h] = place(scene, 0, 0);
  const step = friendly(LABELS_FROM / h);
  for (let row = Math.ceil(view.top / step) * step; row <= view.bottom; row += step) {
    const client = image.client(row);
    const [, y] = place(scene, row, 1);
    if (client == null) continue;
    pen.fillText(client.length > 8 ? `…${client.slice(-7)}` : client, GUTTER - 6, Math.min(Math.max(y + h / 2, 6), height - 6));
    calls += 1;
  }
  return calls;
}

/** The next of 1, 2, 5, 10, 20, 50, ... that is not below `least`. */
function friendly(least: number): number {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, least)));
  return [1, 2, 5, 10].map((by) => by * power).find((step) => step >= least) ?? 1;
}

function outline(scene: Scene, cell: Cell): void {
  const { pen, colours } = scene;
  const [x, y, w, h] = place(scene, cell.row, cell.round);
  const size = (side: number) => Math.max(side, 6);
  pen.lineWidth = 4;
  pen.strokeStyle = colours.background;
  const box = [x + w / 2 - size(w) / 2, y + h / 2 - size(h) / 2, size(w), size(h)] as const;
  pen.strokeRect(...box);
  pen.lineWidth = 2;
  pen.strokeStyle = colours.ink;
  pen.strokeRect(...box);
}
