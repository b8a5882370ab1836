import type { RunDetail } from "../api/client";
import { exports } from "../api/exports";

/** Downloads of a run's tables. */
export function ExportMenu({ run }: { run: RunDetail }) {
  return (
    <details class="menu">
      <summary class="button">Export</summary>
      <ul>
        {exports(run.id).map(({ words, href }) => (
          <li key={href}>
            <a href={href} download>
              {words}
            </a>
          </li>
        ))}
      </ul>
    </details>
  );
}
