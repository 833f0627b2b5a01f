import { afterAll, expect, test } from "bun:test";
import { cleanUp, freeOrigin, launch } from "./support.ts";

afterAll(cleanUp);

test("the client gets a token and the API answers with its claims", async () => {
  const env = { ISSUER: freeOrigin(), API_URL: freeOrigin() };
  const idp = launch("idp", { env });
  const api = launch("api", { env });
  await Promise.all([idp.printed(/authorization server/), api.printed(/API/)]);
  const client = launch("client", { env });
  expect(await client.ended()).toBe(0);
  expect(client.stdout).toContain('"client_id"');
  expect([await idp.stop("SIGTERM"), await api.stop("SIGTERM")]).toEqual([0, 0]);
  console.log(client.stdout, client.stderr, idp.stdout, idp.stderr);
});
