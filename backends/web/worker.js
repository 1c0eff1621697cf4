/** The worker that a model runs in, so that the page never waits. */

import { Host } from "./host.js";
import { parent } from "./platform.js";

const post = await parent((message) => host.hear(message));
const host = new Host(post);
