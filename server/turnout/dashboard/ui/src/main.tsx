import { render } from "preact";
import { App } from "./app";
import { apply } from "./lib/palette";

apply();
const root = document.getElementById("app");
if (root) render(<App />, root);
