/**
 * Preloaded by a program that a test starts: changes the configuration before the program reads it,
 * by the JSON in CONFIGURATION: {"authorizationServer": {…}, "resourceServer": {…}, "client": {…}}.
 */

import * as configuration from "../config.ts";

const changes = JSON.parse(process.env["CONFIGURATION"] ?? "{}");
for (const party of ["authorizationServer", "resourceServer", "client"] as const) {
  Object.assign(configuration[party], changes[party]);
}
