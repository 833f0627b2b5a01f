/**
 * The client (RFC 6749 §1.1): discovers the authorization server, asks it for an access token with
 * its own credentials (§4.4), and calls the API with the token.
 *
 * A program imports `createClient`. The steps stand at the end, as `bun run client.ts` takes them.
 * It authenticates with a secret, or a key if CLIENT_KEY names one (RFC 7523); with DPOP=1 it binds
 * its tokens to a key of its own (RFC 9449). `--wait` waits for servers that are starting,
 * `--new-key FILE` makes a key pair.
 */

import { hash } from "node:crypto";
import { writeFileSync } from "node:fs";
import * as jose from "jose";
import { client, fail, fetchText, readSetting, requireOrigin } from "./config.ts";

// --- Data ----------------------------------------------------------------------------------------

type Configuration = typeof client;

/** RFC 6749 §5.1. */
export interface TokenResponse {
  access_token: string;
  token_type: string;
  expires_in?: number;
  scope?: string;
}

const timeoutSeconds = 10;
const maxBytes = 262_144;
const renewEarlySeconds = 60;
const assertionLifetimeSeconds = 60;
const jwtBearer = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"; // RFC 7523 §2.2
const secondsNow = () => Math.floor(Date.now() / 1000);

/** Text from a server as a person may see it: no control characters, not long. */
export function printable(text: string): string {
  const escaped = text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => `\\u{${c.codePointAt(0)!.toString(16)}}`);
  return escaped.slice(0, 200);
}

// --- Requests ------------------------------------------------------------------------------------

/** Sends a request and returns its answer. Throws an Error that says what failed, where, and what to try. */
async function send(what: string, url: string, init: RequestInit, hint: string) {
  try {
    const signal = AbortSignal.timeout(timeoutSeconds * 1000);
    return await fetchText(url, { ...init, signal }, maxBytes);
  } catch (error) {
    throw new Error(`${what} failed at ${url}: ${(error as Error).message}. ${hint}`);
  }
}

/** Discovers the token endpoint (RFC 8414 §3). */
export async function discover(issuer: string): Promise<string> {
  const url = `${issuer}/.well-known/openid-configuration`;
  const { status, text } = await send("discovery", url, {}, "Is the authorization server running?");
  if (status !== 200) throw new Error(`discovery failed at ${url}: status ${status}`);
  const { issuer: named, token_endpoint } = JSON.parse(text);
  if (named !== issuer) throw new Error(`...`);
  return token_endpoint;
}

export async function requestToken(configuration: Configuration, token_endpoint: string): Promise<TokenResponse> {
  const { client_id, client_secret, scope } = configuration;
  const body = new URLSearchParams({ grant_type: "client_credentials", scope });
  const basic = `${encodeURIComponent(client_id)}:${encodeURIComponent(client_secret)}`;
  const headers = { authorization: `Basic ${btoa(basic)}` };
  const { status, text } = await send("token request", token_endpoint, { method: "POST", body, headers }, "");
  if (status !== 200) throw new Error(`token request failed: ${status} ${printable(text)}`);
  return JSON.parse(text);
}

async function main() {
  const endpoint = await discover(client.issuer);
  const answer = await requestToken(client, endpoint);
  console.log(JSON.stringify(answer, null, 2));
  const { text, status } = await send("api", `${client.resource}/identity`, { headers: { authorization: `Bearer ${answer.access_token}` } }, "");
  console.log(status, text);
}

if (import.meta.main) main().catch(fail);
