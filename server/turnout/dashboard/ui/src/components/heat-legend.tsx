import { MARKS } from "../lib/heat-draw";

export const OUTCOME_WORDS: Record<string, string> = {
  absent: "not available or not asked",
  ok: "took part",
  failed: "failed",
  rejected: "reply rejected",
  missing: "no reply",
};

export function HeatLegend({ overview = false }: { overview?: boolean }) {
  return (
    <ul class="heat-legend" aria-label="Colours and signs">
      {Object.keys(OUTCOME_WORDS).map((name) => (
        <li key={name}>
          <span class="swatch" style={{ background: `var(--outcome-${name})` }} aria-hidden="true">
            {MARKS[name] ?? ""}
          </span>
          {OUTCOME_WORDS[name] ?? name}
        </li>
      ))}
      {overview && <li class="note">cells share pixels: the bluer, the more took part; a trouble shows first</li>}
    </ul>
  );
}
