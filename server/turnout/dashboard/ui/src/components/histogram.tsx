import type { Fairness } from "../api/client";
import type { Num } from "../lib/format";
import { count, plain } from "../lib/format";

interface Props {
  title: string;
  bins: Fairness["histogram"];
  format: (value: Num) => string;
  /** A value to mark on the axis. */
  mark: number | null;
}

const [WIDTH, HEIGHT, FOOT] = [520, 170, 22];

/** How many clients have which value. */
export function Histogram({ title, bins, format, mark }: Props) {
  const most = Math.max(1, ...bins.map((bin) => bin.count));
  const [low, high] = [bins[0]?.low ?? 0, bins.at(-1)?.high ?? 1];
  const at = (value: number) => ((value - low) / (high - low || 1)) * WIDTH;
  const late = mark != null && at(mark) > 0.75 * WIDTH;
  const step = WIDTH / Math.max(1, bins.length);
  const told = bins.filter((bin) => bin.count > 0).map((bin) => `${count(bin.count)} from ${format(bin.low)} to ${format(bin.high)}`);
  return (
    <figure class="small-plot">
      <figcaption>{plain(title)}</figcaption>
      <svg viewBox={`0 0 ${WIDTH} ${HEIGHT + FOOT}`} role="img" aria-label={`${plain(title)}: ${told.join("; ")}`}>
        {bins.map((bin, index) => (
          <g key={index}>
            <rect
              class="bar"
              x={index * step + 1}
              width={Math.max(1, step - 2)}
              y={HEIGHT - (bin.count / most) * (HEIGHT - 16)}
              height={(bin.count / most) * (HEIGHT - 16)}
            >
              <title>{`${format(bin.low)} to ${format(bin.high)}: ${count(bin.count)}`}</title>
            </rect>
            {bin.count > 0 && bins.length <= 24 && (
              <text x={(index + 0.5) * step} y={HEIGHT - (bin.count / most) * (HEIGHT - 16) - 4} text-anchor="middle">
                {count(bin.count)}
              </text>
            )}
          </g>
        ))}
        <line class="axis" x1="0" x2={WIDTH} y1={HEIGHT} y2={HEIGHT} />
        {mark != null && (
          <g>
            <line class="mark" x1={at(mark)} x2={at(mark)} y1="0" y2={HEIGHT} />
            <text x={at(mark) + (late ? -4 : 4)} y="10" text-anchor={late ? "end" : "start"}>
              worst tenth
            </text>
          </g>
        )}
        <text x="0" y={HEIGHT + 16}>
          {format(low)}
        </text>
        <text x={WIDTH} y={HEIGHT + 16} text-anchor="end">
          {format(high)}
        </text>
      </svg>
    </figure>
  );
}
