/** How numbers, sizes and times are written. Unknown is an en dash, never 0. */

export type Num = number | null | undefined;

export const UNKNOWN = "–";

const SIZES = ["B", "kB", "MB", "GB", "TB", "PB"];

/** Three significant digits where that is enough: 0.0123, 1.23, 12.3, 1,234. */
export function number(value: Num): string {
  if (value == null || !Number.isFinite(value)) return UNKNOWN;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e9)) return value.toExponential(2);
  const digits = size >= 100 || Number.isInteger(value) ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 4;
  return value.toLocaleString("en-GB", { maximumFractionDigits: digits });
}

export function count(value: Num): string {
  return value == null ? UNKNOWN : Math.round(value).toLocaleString("en-GB");
}

export function percent(value: Num, digits = 1): string {
  return value == null || !Number.isFinite(value) ? UNKNOWN : `${(100 * value).toFixed(digits)} %`;
}

/** The first letter large, as a heading begins. */
export function title(name: string): string {
  return plain(name.charAt(0).toUpperCase() + name.slice(1));
}

/** Bytes in powers of 1,000. */
export function bytes(value: Num): string {
  if (value == null || !Number.isFinite(value)) return UNKNOWN;
  let unit = 0;
  let size = value;
  while (Math.abs(size) >= 999.95 && unit < SIZES.length - 1) {
    size /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? Math.round(size) : size.toFixed(1)} ${SIZES[unit]}`;
}

export function seconds(value: Num): string {
  if (value == null || !Number.isFinite(value)) return UNKNOWN;
  if (value < 0.001 && value > 0) return `${Math.round(value * 1e6)} µs`;
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  if (value < 59.95) return `${value.toFixed(1)} s`;
  const whole = Math.round(value);
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  if (h >= 48) return `${Math.floor(h / 24)} d ${h % 24} h`;
  return h > 0 ? `${h} h ${m} min` : `${m} min ${s} s`;
}

/** A metric as its name asks for: accuracy and the like in percent, seconds and bytes with their unit. */
export function metric(name: string, value: Num): string {
  if (/(^|-)bytes$/.test(name)) return bytes(value);
  if (/(^|-)seconds$/.test(name)) return seconds(value);
  return isShare(name) && value != null && value >= 0 && value <= 1 ? percent(value) : number(value);
}

export function isShare(name: string): boolean {
  return /(^|[-_/ ])(accuracy|participation|utili[sz]ation|share)$/i.test(name);
}

/** The moment in the reader's zone, short when it was today. */
export function time(iso: string | null | undefined, now = new Date()): string {
  if (!iso) return UNKNOWN;
  const at = new Date(iso);
  const clock = at.toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
  return at.toDateString() === now.toDateString() ? clock : `${dateOf(at)} ${clock}`;
}

function dateOf(at: Date): string {
  const two = (value: number) => String(value).padStart(2, "0");
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
}

export function utc(iso: string | null | undefined): string {
  return iso ? `${new Date(iso).toISOString().replace("T", " ").slice(0, 19)} UTC` : "";
}

export function plural(amount: number, one: string, many = `${one}s`): string {
  return `${count(amount)} ${amount === 1 ? one : many}`;
}

/** A name from outside on one line: control and direction characters are shown, not obeyed. */
export function plain(text: string): string {
  return text.replace(/[\u0000-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "·");
}
