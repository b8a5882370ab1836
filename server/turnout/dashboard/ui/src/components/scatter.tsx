import type { Fairness } from "../api/client";
import type { Num } from "../lib/format";
import { count, percent, plain } from "../lib/format";

interface Props {
  title: string;
  points: Fairness["points"];
  format: (value: Num) => string;
}

const [WIDTH, HEIGHT, FOOT, LEFT] = [520, 170, 22, 52];

/** One dot per client: how often it took part against how it fares. */
export function Scatter({ title, points, format }: Props) {
  const known = points.filter((point) => point.value != null && point.participation != null);
  const values = known.map((point) => point.value ?? 0);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const y = (value: number) => 8 + (1 - (value - low) / (high - low || 1)) * (HEIGHT - 16);
  return (
    <figure class="small-plot">
      <figcaption>{plain(title)}</figcaption>
      <svg
        viewBox={`0 0 ${WIDTH} ${HEIGHT + FOOT}`}
        role="img"
        aria-label={`${plain(title)}: ${count(known.length)} clients between ${format(low)} and ${format(high)}`}
      >
        <line class="axis" x1={LEFT} x2={WIDTH} y1={HEIGHT} y2={HEIGHT} />
        {known.map((point) => (
          <circle key={point.client} class="dot" r="3" cx={LEFT + 4 + (point.participation ?? 0) * (WIDTH - LEFT - 8)} cy={y(point.value ?? 0)}>
            <title>{`client ${point.client}: ${format(point.value)}, took part in ${percent(point.participation, 0)}`}</title>
          </circle>
        ))}
        <text x={LEFT - 8} y="14" text-anchor="end">
          {format(high)}
        </text>
        <text x={LEFT - 8} y={HEIGHT - 4} text-anchor="end">
          {format(low)}
        </text>
        <text x={LEFT} y={HEIGHT + 16}>
          never
        </text>
        <text x={WIDTH} y={HEIGHT + 16} text-anchor="end">
          took part in every round
        </text>
      </svg>
    </figure>
  );
}
