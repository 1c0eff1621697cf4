/** A worker that helps to run a plan. */

import { parent } from "./platform.js";
import { helping } from "./team.js";

const post = await parent((message) => heard(message));
const heard = helping(post);
