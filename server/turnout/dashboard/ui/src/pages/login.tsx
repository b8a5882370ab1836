import { useEffect, useRef, useState } from "preact/hooks";
import { ApiError, logIn } from "../api/client";
import { plain } from "../lib/format";

export function LoginPage({ entered }: { entered: () => void }) {
  const field = useRef<HTMLInputElement>(null);
  const [error, setError] = useState("");
  const [busy, setBusy] = useState(false);
  useEffect(() => {
    document.title = "Log in · Turnout";
    field.current?.focus();
  }, []);

  const submit = async (event: SubmitEvent) => {
    event.preventDefault();
    setBusy(true);
    setError("");
    try {
      await logIn(field.current?.value.trim() ?? "");
      entered();
    } catch (problem) {
      const refused = problem instanceof ApiError && problem.status === 401;
      setError(refused ? "This is not the token of this dashboard." : problem instanceof Error ? problem.message : "");
      setBusy(false);
      field.current?.select();
    }
  };
  return (
    <div class="login card">
      <h1 tabIndex={-1}>Log in</h1>
      <p>This dashboard asks for its token: the content of the file that it was started with.</p>
      <form onSubmit={(event) => void submit(event)}>
        <label for="token">Token</label>
        <input
          id="token"
          ref={field}
          type="password"
          autocomplete="current-password"
          required
          aria-invalid={error !== ""}
          aria-describedby={error ? "token-error" : undefined}
        />
        {error && (
          <p id="token-error" class="failure" role="alert">
            {plain(error)}
          </p>
        )}
        <button type="submit" class="primary" disabled={busy}>
          Log in
        </button>
      </form>
    </div>
  );
}
