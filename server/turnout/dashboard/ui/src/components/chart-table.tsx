import { useState } from "preact/hooks";
import type { Num } from "../lib/format";
import { plain } from "../lib/format";
import type { Line } from "../lib/plot";

const MOST = 500;

interface Props {
  title: string;
  xLabel: string;
  x: readonly number[];
  xFormat: (value: number) => string;
  lines: readonly Line[];
  format: (value: Num) => string;
}

/** The numbers of a chart for who does not see it; made only when it is opened. */
export function ChartTable({ title, xLabel, x, xFormat, lines, format }: Props) {
  const [open, setOpen] = useState(false);
  const first = Math.max(0, x.length - MOST);
  return (
    <details class="numbers" onToggle={(event) => setOpen(event.currentTarget.open)}>
      <summary>Numbers</summary>
      {open && (
        <div class="scroll" tabIndex={0} role="region" aria-label={`${plain(title)}, numbers`}>
          {first > 0 && <p class="note">The last {MOST} points.</p>}
          <table>
            <thead>
              <tr>
                <th scope="col">{xLabel}</th>
                {lines.map((line) => (
                  <th key={line.label} scope="col" class="number">
                    <bdi>{plain(line.label)}</bdi>
                  </th>
                ))}
              </tr>
            </thead>
            <tbody>
              {x.slice(first).map((at, index) => (
                <tr key={at}>
                  <th scope="row">{xFormat(at)}</th>
                  {lines.map((line) => (
                    <td key={line.label} class="number">
                      {format(line.values[first + index])}
                    </td>
                  ))}
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </details>
  );
}
