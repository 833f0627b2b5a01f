/** The two servers and a client in this process, each with settings of its own and a free port. */

import { authorizationServer, client, type LogSink, resourceServer } from "../../config.ts";
import { type AuthorizationServerSettings, type ResourceServerSettings } from "../../config.ts";
import { start as startApi } from "../../api.ts";
import { start as startIdp } from "../../idp.ts";
import { TokenSource } from "../../client.ts";

export type LogLine = Record<string, any> & { event: string };

/** What stands for the API where no API runs. */
export const resource = "https://api.example.com";

/** Collects the lines of a log, parsed. */
function collector(): { log: LogSink; lines: LogLine[] } {
  const lines: LogLine[] = [];
  const write = (line: string) => lines.push(JSON.parse(line));
  return { log: { write, flush: () => 0 }, lines };
}

type IdpChanges = Partial<AuthorizationServerSettings>;
type ApiChanges = Partial<ResourceServerSettings>;

/** An authorization server; `lines` is its log. */
export async function idp(changes: IdpChanges = {}) {
  const { log, lines } = collector();
  const settings: AuthorizationServerSettings = {
    ...authorizationServer,
    issuer: "http://127.0.0.1:0",
    scopes: [{ scope: "api1", description: "My API", resource }],
    databaseUrl: "sqlite://:memory:",
    drainSeconds: 0,
    log,
    ...changes,
  };
  const running = await startIdp(settings);
  return { ...running, tokenEndpoint: `${running.url}/connect/token`, lines };
}

/** An API that trusts `issuer`; `lines` is its log. */
export async function api(issuer: string, changes: ApiChanges = {}) {
  const { log, lines } = collector();
  const settings: ResourceServerSettings = {
    ...resourceServer,
    resource: "http://127.0.0.1:0",
    issuer,
    drainSeconds: 0,
    log,
    ...changes,
  };
  return { ...(await startApi(settings)), lines };
}

/** An API and an authorization server that issues tokens for it. */
export async function pair(changes: { idp?: IdpChanges; api?: ApiChanges } = {}) {
  // The API must know the issuer and the issuer the API: one of both ports is taken beforehand.
  const reserved = reservePort();
  const url = `http://127.0.0.1:${reserved.port}`;
  const scopes = [{ scope: "api1", description: "My API", resource: url }];
  const issuer = await idp({ scopes, ...changes.idp });
  const protectedApi = await api(issuer.url, { resource: url, reusePort: true, ...changes.api });
  reserved.release();
  return { idp: issuer, api: protectedApi };
}

/** A port that the system gave and nobody else gets. Whoever takes it sets `reusePort`. */
export function reservePort(): { port: number; release: () => void } {
  const fetch = () => new Response(null, { status: 503 });
  const server = Bun.serve({ hostname: "127.0.0.1", port: 0, reusePort: true, fetch });
  return { port: server.port!, release: () => void server.stop(true) };
}

/** The client's tokens from `issuer`, for the API at `resource`. */
export function tokenSource(issuer: string, changes: Partial<typeof client> = {}): TokenSource {
  return new TokenSource({ ...client, issuer, resource, ...changes });
}
