import { plain } from "../lib/format";
import type { Palette } from "../lib/palette";
import { seriesStyle } from "../lib/palette";
import type { Line } from "../lib/plot";

interface Props {
  lines: readonly Line[];
  off: ReadonlySet<string>;
  colours: Palette;
  stack: boolean;
  value: (line: Line) => string;
  toggle: (label: string) => void;
}

/** The lines with their colour, dash and value at the cursor; a click hides or shows one. */
export function ChartLegend({ lines, off, colours, stack, value, toggle }: Props) {
  return (
    <ul class="legend">
      {lines.map((line, index) => {
        const { colour: usual, dash } = seriesStyle(colours, line.style ?? index);
        const colour = line.colour ?? usual;
        return (
          <li key={line.label}>
            <button type="button" aria-pressed={!off.has(line.label)} onClick={() => toggle(line.label)}>
              <svg width="24" height="10" aria-hidden="true">
                {stack ? (
                  <rect width="14" height="10" x="5" fill={colour} />
                ) : (
                  <line x1="0" x2="24" y1="5" y2="5" stroke={colour} stroke-width="2.5" stroke-dasharray={dash.join(" ")} />
                )}
              </svg>
              <bdi>{plain(line.label)}</bdi>
              <span class="value">{value(line)}</span>
            </button>
          </li>
        );
      })}
    </ul>
  );
}
