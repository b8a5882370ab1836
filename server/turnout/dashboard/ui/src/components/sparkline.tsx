/** A line without axes, as wide as a word; a gap where a value is missing. */

const WIDTH = 96;
const HEIGHT = 22;

export function sparkPath(values: readonly (number | null)[], width = WIDTH, height = HEIGHT): string {
  const known = values.filter((value): value is number => value != null);
  if (known.length === 0) return "";
  const low = Math.min(...known);
  const span = Math.max(...known) - low || 1;
  const step = (width - 4) / Math.max(values.length - 1, 1);
  let path = "";
  let pen = false;
  values.forEach((value, index) => {
    if (value == null) {
      pen = false;
      return;
    }
    const x = (2 + index * step).toFixed(1);
    const y = (height - 2 - ((value - low) / span) * (height - 4)).toFixed(1);
    path += `${pen ? "L" : "M"}${x} ${y}`;
    if (!pen && values[index + 1] == null) path += "h0.1"; // A point of its own is still a dot.
    pen = true;
  });
  return path;
}

export function Sparkline({ values, label }: { values: readonly (number | null)[]; label: string }) {
  return (
    <svg class="spark" viewBox={`0 0 ${WIDTH} ${HEIGHT}`} width={WIDTH} height={HEIGHT} role="img" aria-label={label}>
      <path d={sparkPath(values)} />
    </svg>
  );
}
