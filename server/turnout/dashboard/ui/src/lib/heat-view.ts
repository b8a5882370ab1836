/** Which part of the matrix (clients x rounds) is on show, and how it moves. No drawing here. */

/** Rows `top` to `bottom` and rounds `first` to `last`, both ends included; rounds count from 1, rows from 0. */
export interface View {
  top: number;
  bottom: number;
  first: number;
  last: number;
}

export interface Totals {
  clients: number;
  rounds: number;
}

export interface Cell {
  row: number;
  round: number;
}

/** What is asked of the server: a window, and how many rows and columns it may answer with. */
export interface Request extends View {
  maxRows: number;
  maxColumns: number;
}

const LEAST_ROWS = 4;
const LEAST_ROUNDS = 8;

export function whole(totals: Totals): View {
  return { top: 0, bottom: Math.max(0, totals.clients - 1), first: 1, last: Math.max(1, totals.rounds) };
}

export function rows(view: View): number {
  return view.bottom - view.top + 1;
}

export function columns(view: View): number {
  return view.last - view.first + 1;
}

export function isWhole(view: View, totals: Totals): boolean {
  return view.top === 0 && view.first === 1 && view.bottom >= totals.clients - 1 && view.last >= totals.rounds;
}

/** `start` and `size` moved and shrunk so that they lie within `low` to `low + total - 1`. */
function within(start: number, size: number, low: number, total: number, least: number): [number, number] {
  const span = Math.max(Math.min(least, total), Math.min(Math.round(size), total), 1);
  const from = Math.max(low, Math.min(Math.round(start), low + total - span));
  return [from, from + span - 1];
}

export function clamped(view: View, totals: Totals): View {
  const [top, bottom] = within(view.top, rows(view), 0, totals.clients, LEAST_ROWS);
  const [first, last] = within(view.first, columns(view), 1, totals.rounds, LEAST_ROUNDS);
  return { top, bottom, first, last };
}

export function panned(view: View, totals: Totals, byRows: number, byRounds: number): View {
  return clamped(
    { top: view.top + byRows, bottom: view.bottom + byRows, first: view.first + byRounds, last: view.last + byRounds },
    totals,
  );
}

/** The view `factor` as large, about a cell that keeps its place. */
export function zoomed(view: View, totals: Totals, factor: number, at: Cell): View {
  const [height, width] = [grown(rows(view), factor, LEAST_ROWS), grown(columns(view), factor, LEAST_ROUNDS)];
  const top = at.row - ((at.row - view.top) * height) / rows(view);
  const first = at.round - ((at.round - view.first) * width) / columns(view);
  return clamped({ top, bottom: top + height - 1, first, last: first + width - 1 }, totals);
}

function grown(size: number, factor: number, least: number): number {
  return factor > 1 ? Math.ceil(size * factor) : Math.max(least, Math.floor(size * factor));
}

/** The view moved as little as it takes to show `cell`. */
export function revealing(view: View, totals: Totals, cell: Cell): View {
  const down = Math.max(0, cell.row - view.bottom) || Math.min(0, cell.row - view.top);
  const right = Math.max(0, cell.round - view.last) || Math.min(0, cell.round - view.first);
  return down || right ? panned(view, totals, down, right) : view;
}

/** What to load for a view on so many pixels: half a screen more on each side, not finer than pixels. */
export function wanted(view: View, totals: Totals, width: number, height: number): Request {
  const [rowStep, columnStep] = steps(view, width, height);
  const [marginRows, marginColumns] = [Math.ceil(rows(view) / 2), Math.ceil(columns(view) / 2)];
  const window = {
    top: Math.max(0, view.top - marginRows),
    bottom: Math.min(totals.clients - 1, view.bottom + marginRows),
    first: Math.max(1, view.first - marginColumns),
    last: Math.min(totals.rounds, view.last + marginColumns),
  };
  return {
    ...window,
    maxRows: Math.ceil(rows(window) / rowStep),
    maxColumns: Math.ceil(columns(window) / columnStep),
  };
}

/** How many clients and rounds share a cell so that a cell is not smaller than a pixel. */
export function steps(view: View, width: number, height: number): [number, number] {
  return [Math.max(1, Math.ceil(rows(view) / height)), Math.max(1, Math.ceil(columns(view) / width))];
}

export interface Loaded {
  first_client: number;
  first_round: number;
  last_round: number;
  rows: number;
  row_step: number;
  column_step: number;
}

/** Whether what is loaded shows a view without a gap and as finely as the pixels allow. */
export function shows(loaded: Loaded, view: View, totals: Totals, width: number, height: number): boolean {
  const [rowStep, columnStep] = steps(view, width, height);
  const last = Math.min(totals.clients, loaded.first_client + loaded.rows * loaded.row_step) - 1;
  return (
    loaded.first_client <= view.top &&
    last >= view.bottom &&
    loaded.first_round <= view.first &&
    loaded.last_round >= view.last &&
    loaded.row_step <= rowStep &&
    loaded.column_step <= columnStep
  );
}

/** The cell under a point of the drawing; null beyond its edges. */
export function cellAt(view: View, x: number, y: number, width: number, height: number): Cell | null {
  if (x < 0 || y < 0 || x >= width || y >= height) return null;
  return {
    row: view.top + Math.floor((y / height) * rows(view)),
    round: view.first + Math.floor((x / width) * columns(view)),
  };
}

/** Round numbers for an axis: at most `most`, evenly spaced at a friendly distance. */
export function ticks(first: number, last: number, most: number): number[] {
  const span = Math.max(1, last - first);
  const power = 10 ** Math.floor(Math.log10(span / most || 1));
  const step = Math.max(1, [1, 2, 5, 10].map((by) => by * power).find((by) => span / by <= most) ?? span);
  const found: number[] = [];
  for (let at = Math.ceil(first / step) * step; at <= last; at += step) found.push(at);
  return found;
}
