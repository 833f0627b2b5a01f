/**
 * What the three parties are told: addresses, scopes, registered clients, lifetimes.
 *
 * The first part is data, one literal for each party, and the only place that reads the environment.
 * The second part is plumbing that all programs share; on a first reading you can skip it.
 * On three machines each party has a copy of this file, with its own literal filled in.
 */

import { X509Certificate, createPrivateKey } from "node:crypto";
import { existsSync, linkSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname } from "node:path";
import * as nodeTls from "node:tls";
import * as jose from "jose";

// --- Settings ------------------------------------------------------------------------------------

/** A registered client: RFC 7591 §2, RFC 9449 §5.2, and names of our own. */
export interface ClientRegistration {
  client_id: string;
  /** SHA-256 in base64, several while a secret is changed; `expires_at` in seconds since 1970. */
  client_secrets?: { sha256: string; expires_at?: number }[];
  /** Public keys, for `private_key_jwt`: the keys themselves, or where the client publishes them. */
  jwks?: { keys: jose.JWK[] };
  jwks_uri?: string;
  /** The only algorithm that the client's assertions may use; without it any accepted one. */
  token_endpoint_auth_signing_alg?: string;
  grant_types: string[];
  /** Scopes that the client may have, separated by spaces. */
  scope: string;
  access_token_lifetime_seconds: number;
  dpop_bound_access_tokens?: boolean;
  /** Extra claims for this client's tokens. */
  claims?: Record<string, unknown>;
}

const { env } = process;
const issuer = env["ISSUER"] || "https://localhost:5001";
const resource = env["API_URL"] || "https://localhost:6001";
const apiScope = "api1";

/** PEM files. The servers make the development certificate when they need it and it is missing. */
const developmentFile = "keys/localhost.pem";
const tls = { certificateFile: env["TLS_CERT"], keyFile: env["TLS_KEY"], developmentFile };

/** What both servers do alike. */
const serverDefaults = {
  tls,
  /** Lets several processes listen on one port (Linux). */
  reusePort: env["REUSE_PORT"] === "1",
  /** While it drains, a server still answers, and asks its callers to come back elsewhere. */
  drainSeconds: 0.5,
  log: (env["LOG"] === "off" ? "off" : "stdout") as "stdout" | "off" | LogSink,
  /** Milliseconds since 1970. A test can pass another clock. */
  clock: () => Date.now(),
};

/**
 * How soon a change of the signing keys is known: to all instances, to caches, and to the APIs; and
 * how long a server waits before it fetches keys again for a token that names an unknown one.
 */
const keyTimes = { pollSeconds: 10, maxAgeSeconds: 60, refreshSeconds: 300, coolDownSeconds: 5 };

/** Signature algorithms that are accepted from others: only asymmetric ones. */
const acceptedAlgorithms = [
  ...["ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"],
  ...["EdDSA", "Ed25519", "ML-DSA-44", "ML-DSA-65", "ML-DSA-87"],
];

export const authorizationServer = {
  issuer,
  /** Where to listen in plain http, as host:port, when a proxy in front ends TLS. */
  listen: env["ISSUER_LISTEN"],
  /** Each scope belongs to one API, whose identifier becomes the `aud` of its tokens. */
  scopes: [{ scope: apiScope, description: "My API", resource }],
  clients: [
    {
      client_id: "client",
      client_secrets: [{ sha256: "K7gNU3sdo+OL0wNhqoVWhr3g6s1xYv72ol/pe/Unols=" }], // "secret"
      grant_types: ["client_credentials"],
      scope: apiScope,
      access_token_lifetime_seconds: 3600,
    },
  ] satisfies ClientRegistration[] as ClientRegistration[],
  acceptedAlgorithms,
  signingKeys: {
    /** The first one signs; the keys of all are published. */
    algorithms: ["ES256"],
    rotationSeconds: 90 * 86_400,
    /** How long a key stays published after it signed last. */
    retentionSeconds: 14 * 86_400,
    ...keyTimes,
  },
  databaseUrl: env["DATABASE_URL"] || "sqlite://keys/keys.db",
  /** How long a start waits for a database that does not answer yet. */
  databaseWaitSeconds: 30,
  /** Secrets of 32 bytes in base64url, separated by commas: the first seals, all open. */
  keyEncryptionSecret: env["KEY_ENCRYPTION_SECRET"] || "",
  ...serverDefaults,
};

export const resourceServer = {
  /** The address of the API, and the identifier that its tokens carry as `aud`. */
  resource,
  resource_name: "My API",
  listen: env["API_LISTEN"],
  issuer,
  /** What a token must carry for GET /identity. */
  scope: apiScope,
  acceptedAlgorithms,
  refreshSeconds: keyTimes.refreshSeconds,
  coolDownSeconds: keyTimes.coolDownSeconds,
  /** How long the last known keys are used while the issuer cannot be reached. */
  keepKeysSeconds: 86_400,
  maxBodyBytes: 1_048_576,
  ...serverDefaults,
};

export const client = {
  issuer,
  resource,
  client_id: env["CLIENT_ID"] || "client",
  client_secret: env["CLIENT_SECRET"] || "secret",
  scope: env["SCOPE"] || apiScope,
  /** A file with a private JWK: the client authenticates with it instead of the secret. */
  keyFile: env["CLIENT_KEY"],
  /** Binds the tokens to a key of this process (RFC 9449). */
  dpop: !["", "0"].includes(env["DPOP"] ?? ""),
  tls,
  clock: () => Date.now(),
  /** The first proxy variable that is set, for a hint when a connection fails. */
  proxyVariable: ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"].find((name) => env[name]),
};

export type AuthorizationServerSettings = typeof authorizationServer;
export type ResourceServerSettings = typeof resourceServer;
export type ClientSettings = typeof client;
type TlsFiles = typeof tls;

// --- Plumbing (a first reader can stop here): constants and words ---------------------------------

/** How far the clocks of two machines may differ. */
export const leewaySeconds = 30;
/** How old a DPoP proof may be (RFC 9449 §11.1). */
export const proofMaxAgeSeconds = 90;
/** The parameters of a private or symmetric key (RFC 7518 §6, RFC 8037 §2, ML-DSA). */
export const privateMembers = ["d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"];
/** For answers that no cache may keep; RFC 6749 §5.1 asks for both fields. */
export const noStore = { "cache-control": "no-store", pragma: "no-cache" };

export const isText = (value: unknown): value is string =>
  typeof value === "string" && value !== "";

export const secondsAt = (clock: () => number) => Math.floor(clock() / 1000);

/** SHA-256 of a text in UTF-8. */
export const sha256 = (text: string, encoding: "base64" | "base64url"): string =>
  Bun.SHA256.hash(text, encoding);

/**
 * Why a request is turned away. The code names a row in the server's own table of errors; the reason
 * and the details are for its log, never for the caller.
 */
export class Refusal<Code extends string> extends Error {
  readonly code: Code;
  readonly details: Record<string, unknown>;

  constructor(code: Code, reason: string, details: Record<string, unknown> = {}) {
    super(reason.slice(0, 2_000)); // it may quote a request
    this.code = code;
    this.details = details;
  }
}

/** An error in one sentence for the log. jose says which claim is wrong; this adds its value. */
export function reasonOf(error: unknown): string {
  const { JWTClaimValidationFailed, JWTExpired } = jose.errors;
  if (!(error instanceof JWTClaimValidationFailed || error instanceof JWTExpired))
    return String(error instanceof Error ? error.message : error).slice(0, 2_000);
  const value = JSON.stringify(error.payload[error.claim]) ?? "absent";
  return `${error.message}; it is ${value.slice(0, 200)}`;
}

// --- Plumbing: addresses and TLS -----------------------------------------------------------------

/** Whether a URL names this machine. */
export const isLoopback = (url: URL) => /^(localhost|127(\.\d+){3}|\[::1\])$/.test(url.hostname);

const withoutSlash = (text: string) => text.replace(/\/$/, "");

/**
 * The URL of an issuer or of an API: https, or http on a loopback host; a path is allowed, a query,
 * a fragment and credentials are not. Throws an Error that says what to write, without a password.
 */
export function parseServerUrl(setting: string, value: string): URL {
  const url = URL.parse(value);
  if (!url) throw new Error(`${setting} is not a URL. Write for example https://auth.example.com.`);
  const plain = withoutSlash(`${url.origin}${url.pathname}`);
  if (url.protocol !== "https:" && !(url.protocol === "http:" && isLoopback(url)))
    throw new Error(
      `${setting} must be https, or http on a loopback host, not ${url.protocol}//${url.host}.`,
    );
  if (withoutSlash(value) !== plain)
    throw new Error(`${setting} must be a host and a path alone. Write ${plain}.`);
  return url;
}

/** The same for a server of our own, whose URL does not end in a slash. */
export function parseOwnUrl(setting: string, value: string): URL {
  const url = parseServerUrl(setting, value);
  if (!value.endsWith("/")) return url;
  throw new Error(`${setting} must not end in a slash. Write ${withoutSlash(value)}.`);
}

/** A well-known URI, which stands between host and path (RFC 8414 §3.1, RFC 9728 §3.1). */
export function wellKnownUrl(url: string, name: string): string {
  const { origin, pathname } = new URL(url);
  return `${origin}/.well-known/${name}${withoutSlash(pathname)}`;
}

/** Where OpenID Connect Discovery §4 puts the metadata of an issuer: behind its path. */
export const metadataUrl = (issuer: string) =>
  `${withoutSlash(issuer)}/.well-known/openid-configuration`;

/** Options for Bun.serve: listen at `url`, or in plain http at the host:port of `listen`. */
export function listenOptions(
  name: "ISSUER" | "API",
  url: URL,
  { listen, reusePort, tls: files }: Pick<ResourceServerSettings, "listen" | "reusePort" | "tls">,
) {
  const address = listen ? URL.parse(`http://${listen}`) : url;
  if (!address || (listen && !/^[^/?#@\\]+:\d+$/.test(listen)))
    throw new Error(`${name}_LISTEN must be host:port, for example 127.0.0.1:8080.`);
  // A loopback issuer takes weak secrets, and plain http is for this machine or its proxy.
  if (isLoopback(url) && !isLoopback(address))
    throw new Error(`${name}_LISTEN must be on a loopback host, as ${url.origin} is.`);
  // A URL drops the port that is the default of its scheme.
  const port = Number(address.port || (address.protocol === "https:" ? 443 : 80));
  // Longer than a load balancer keeps an idle connection, so that it is not we who end it.
  const options = { hostname: address.hostname, port, reusePort, idleTimeout: 75 };
  if (address.protocol === "http:") return options;
  const isDevelopment = !files.certificateFile && !files.keyFile;
  const ways = `TLS_CERT and TLS_KEY, or ${name}_LISTEN behind a proxy that ends TLS`;
  if (isDevelopment && !isLoopback(url)) throw new Error(`${url.origin} needs ${ways}.`);
  const pair = isDevelopment ? developmentCertificate(files.developmentFile) : ownPair(files);
  // RFC 9325 §4.2: TLS 1.2 only with forward secrecy and AEAD; TLS 1.3 has nothing else.
  return { ...options, tls: { ...pair, ciphers: "ECDHE+AESGCM:ECDHE+CHACHA20" } };
}

/** The certificate and the key that TLS_CERT and TLS_KEY name. */
function ownPair({ certificateFile, keyFile }: TlsFiles): { cert: string; key: string } {
  const read = (variable: string, file = "") => {
    try {
      return readFileSync(file, "utf8");
    } catch (error) {
      throw new Error(`${variable} must name a readable file: ${reasonOf(error)}`);
    }
  };
  const pair = { cert: read("TLS_CERT", certificateFile), key: read("TLS_KEY", keyFile) };
  parsePair(pair, "TLS_CERT and TLS_KEY must be a certificate and its key, in PEM.");
  return pair;
}

/** Throws an Error with `message` unless both are readable and belong together. */
function parsePair({ cert, key }: { cert: string; key: string }, message: string) {
  try {
    const certificate = new X509Certificate(cert);
    if (certificate.checkPrivateKey(createPrivateKey(key))) return certificate;
  } catch {
    // What OpenSSL says of a damaged file helps nobody.
  }
  throw new Error(message);
}

/** Key and certificate from one file, which is made where it is missing or out of date. */
function developmentCertificate(file: string): { cert: string; key: string } {
  if (!existsSync(file) || isOutdated(file)) makeDevelopmentCertificate(file);
  const pem = readFileSync(file, "utf8");
  return { cert: pem, key: pem };
}

/** Whether it has expired, or is an authority: one that could sign for other names is replaced. */
function isOutdated(file: string): boolean {
  const pem = readFileSync(file, "utf8");
  const remedy = `${file} is damaged. Delete it, and the next start makes a new one.`;
  const certificate = parsePair({ cert: pem, key: pem }, remedy);
  return certificate.ca || Date.parse(certificate.validTo) < Date.now();
}

/** For this machine and for servers only: no authority, so that it signs nothing else. */
const selfSigned = [
  ...["req", "-x509", "-nodes", "-days", "825", "-newkey", "ec"],
  ...["-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=localhost"],
  ...["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"],
  ...["-addext", "basicConstraints=critical,CA:FALSE"],
  ...["-addext", "keyUsage=critical,digitalSignature", "-addext", "extendedKeyUsage=serverAuth"],
];

function makeDevelopmentCertificate(file: string): void {
  const openssl = Bun.which("openssl");
  const ways = "install it, set TLS_CERT and TLS_KEY, or use http on a loopback host";
  if (!openssl) throw new Error(`The program openssl is missing: ${ways}.`);
  mkdirSync(dirname(file), { recursive: true, mode: 0o700 });
  const draft = `${file}.${crypto.randomUUID()}`;
  writeFileSync(draft, "", { mode: 0o600 });
  try {
    const made = Bun.spawnSync([openssl, ...selfSigned, "-keyout", draft, "-out", draft]);
    if (!made.success) throw new Error(`The program openssl failed: ${ways}.`);
    if (existsSync(file) && isOutdated(file)) rmSync(file);
    linkSync(draft, file);
  } catch (error) {
    // link() never overwrites: if another program was faster, its certificate stays.
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
  } finally {
    rmSync(draft);
  }
}

// --- Plumbing: requests to other servers ---------------------------------------------------------

/**
 * A fetch that never follows a redirect, for Bun would send the body and the proof to another host.
 * A loopback host is reached without a proxy, which would read the secret, and is trusted with the
 * certificate that the servers here use.
 */
export async function directFetch(
  url: string | URL,
  init: BunFetchRequestInit,
  { certificateFile, developmentFile }: TlsFiles,
): Promise<Response> {
  const target = new URL(url);
  if (!isLoopback(target)) return await fetch(url, { ...init, redirect: "manual" });
  const file = certificateFile || developmentFile;
  const own = target.protocol === "https:" && existsSync(file) ? [readFileSync(file, "utf8")] : [];
  const ca = [...own, ...nodeTls.getCACertificates()];
  return await fetch(url, { ...init, redirect: "manual", proxy: false, tls: { ca } });
}

const maxAnswerBytes = 1_048_576;

/** The same for an answer that must be short: metadata, keys, a token. Rejects for a longer one. */
export async function boundedFetch(
  url: string,
  init: BunFetchRequestInit,
  files: TlsFiles,
): Promise<Response> {
  // Unpacking would go past the bound before the first chunk is seen.
  const response = await directFetch(url, { ...init, decompress: false }, files);
  const chunks: Uint8Array[] = [];
  let bytes = 0;
  for await (const chunk of response.body ?? []) {
    bytes += chunk.byteLength;
    if (bytes > maxAnswerBytes) throw new Error(`The answer is over ${maxAnswerBytes} bytes long.`);
    chunks.push(chunk);
  }
  return new Response(bytes > 0 ? Buffer.concat(chunks) : null, response);
}

/** The JSON object that a GET answers. Rejects for any other answer. */
export async function fetchJson(url: string, signal: AbortSignal, files: TlsFiles) {
  parseServerUrl("The address", url.split("?")[0] ?? "");
  const response = await boundedFetch(url, { signal }, files);
  if (response.status !== 200) throw new Error(`${url} answered with status ${response.status}.`);
  return Object(await response.json()) as Record<string, unknown>;
}

/** The keys could not be fetched, which is not the fault of whoever presented a JWT. */
export class KeysUnavailable extends Error {}

type RemoteKeysRules = Record<"coolDownSeconds" | "maxAgeSeconds" | "keepSeconds", number>;

/**
 * The public keys of another party, as its JWK Set has them (RFC 7517 §5). jose keeps the set and
 * fetches it again for an unknown `kid`, at most once in a cool-down. This adds what jose lacks: a
 * cool-down after a failure, and the last known keys while a fetch fails.
 */
export class RemoteKeys {
  /** The keys in use: another array if, and only if, the set has changed. */
  keys: jose.JWK[] = [];
  readonly #rules: RemoteKeysRules;
  readonly #clock: () => number;
  readonly #jwkSet: ReturnType<typeof jose.createRemoteJWKSet>;
  #fetched: jose.JWK[] = [];
  #fetchedAt = -Infinity;
  #failedAt = -Infinity;
  #failure = new KeysUnavailable();

  /**
   * `fetchKeys` resolves with the `keys` of a JWK Set. A use of keys older than `maxAgeSeconds` waits
   * for new ones; without new ones they are used until they are `keepSeconds` old.
   */
  constructor(
    fetchKeys: (signal: AbortSignal) => Promise<unknown>,
    rules: RemoteKeysRules,
    clock: () => number,
  ) {
    this.#rules = rules;
    this.#clock = clock;
    // jose wants an address; our own fetch knows where to look.
    this.#jwkSet = jose.createRemoteJWKSet(new URL("https://keys.invalid"), {
      cacheMaxAge: Infinity,
      cooldownDuration: rules.coolDownSeconds * 1000,
      timeoutDuration: 5_000,
      [jose.customFetch]: (_url, { signal }) => this.#fetchJwkSet(() => fetchKeys(signal)),
    });
  }

  get areKnown(): boolean {
    return this.#clock() - this.#fetchedAt <= this.#rules.keepSeconds * 1000;
  }

  /** The key for a JWT, as jose asks for it. Rejects with KeysUnavailable if a fetch failed. */
  find: jose.JWTVerifyGetKey = async (header, jws) => {
    const isOld = this.#clock() - this.#fetchedAt > this.#rules.maxAgeSeconds * 1000;
    const failure = isOld ? await this.refresh().catch((error: unknown) => error) : undefined;
    if (failure && !this.areKnown) throw failure;
    return await this.#jwkSet(header, jws).finally(() => this.#noteChange());
  };

  /** Fetches the keys, once at a time. Rejects with KeysUnavailable, and then keeps what it has. */
  async refresh(): Promise<void> {
    await this.#jwkSet.reload().finally(() => this.#noteChange());
  }

  #noteChange(): void {
    if (!Bun.deepEquals(this.#fetched, this.keys)) this.keys = this.#fetched;
  }

  async #fetchJwkSet(fetchKeys: () => Promise<unknown>): Promise<Response> {
    const sinceFailure = this.#clock() - this.#failedAt;
    if (sinceFailure < this.#rules.coolDownSeconds * 1000) throw this.#failure;
    try {
      this.#fetched = usableKeys(await fetchKeys());
      this.#fetchedAt = this.#clock();
      return Response.json({ keys: this.#fetched });
    } catch (error) {
      this.#failedAt = this.#clock();
      this.#failure = new KeysUnavailable(`The keys could not be fetched: ${reasonOf(error)}`);
      throw this.#failure;
    }
  }
}

/** RFC 7517 §5: unknown kinds of keys are ignored. An empty set is an answer, junk is none. */
function usableKeys(keys: unknown): jose.JWK[] {
  if (!Array.isArray(keys)) throw new Error("The JWK Set has no list of keys.");
  const usable = keys.filter((jwk) => ["EC", "RSA", "OKP", "AKP"].includes(jwk?.kty));
  if (keys.length > 0 && usable.length === 0) throw new Error("The JWK Set has no usable key.");
  return usable;
}

// --- Plumbing: answering, stopping, logging ------------------------------------------------------

export type Handler = (
  request: Request,
  server: Bun.Server<undefined>,
) => Response | Promise<Response>;

/** The path of a request. Its target need not be an absolute URL (HTTP/1.0, CONNECT). */
export const pathOf = (request: Request, base: string) => URL.parse(request.url, base)?.pathname;

/**
 * Answers each request by the handler that stands at its method and path, as "GET /health" or
 * "POST /orders". HEAD follows GET. Elsewhere 404, and 405 for a path that has other methods.
 */
export function router(base: string, handlers: Map<string, Handler>): Handler {
  return async (request, server) => {
    const path = pathOf(request, base);
    const method = request.method === "HEAD" ? "GET" : request.method;
    const handler = handlers.get(`${method} ${path}`);
    if (handler) return await handler(request, server);
    const known = ["GET", "POST", "PUT", "PATCH", "DELETE"];
    const allowed = known.filter((name) => handlers.has(`${name} ${path}`));
    if (allowed.length === 0) return new Response("Not Found", { status: 404, headers: noStore });
    // RFC 9110 §15.5.6: a 405 names the methods that the target has.
    const allow = allowed.join(", ").replace("GET", "GET, HEAD");
    return new Response("Method Not Allowed", { status: 405, headers: { ...noStore, allow } });
  };
}

/** What `start` of a server resolves with. */
export interface RunningServer {
  /** Where it is reached: the issuer of the authorization server, the resource of the API. */
  url: string;
  server: Bun.Server<undefined>;
  /** Drains and stops the server, and closes what it has opened. */
  stop: () => Promise<void>;
}

/** A server from its start to its stop: the one wrapper around all of its answers. */
export class Lifecycle {
  isStopping = false;
  readonly #log: Log;

  constructor(log: Log) {
    this.#log = log;
  }

  /** Turns an unexpected failure into a constant 500, and closes connections while stopping. */
  async answer(handler: Handler, ...[request, server]: Parameters<Handler>): Promise<Response> {
    let response: Response;
    try {
      response = await handler(request, server);
    } catch (error) {
      const reason = error instanceof Error ? error.stack : error;
      this.#log.write("failure", { reason: String(reason).slice(0, 2_000) });
      response = new Response("Internal Server Error", { status: 500, headers: noStore });
    }
    if (this.isStopping) response.headers.set("connection", "close");
    return response;
  }

  /**
   * Lets callers come back elsewhere, then waits at most 5 s for answers that are under way. Without
   * the pause, a client that keeps its connection gets a reset on its next request.
   */
  async stop(server: Bun.Server<undefined>, drainSeconds: number): Promise<void> {
    this.isStopping = true;
    await Bun.sleep(drainSeconds * 1000);
    await Promise.race([server.stop(), Bun.sleep(5_000)]);
    await server.stop(true);
    await this.#log.flush();
  }
}

/** The URL of a server: where it says port 0, the port that the system gave. */
export const urlOf = (url: string, { port }: Bun.Server<undefined>) =>
  url.replace(/:0(?=\/|$)/, `:${port}`);

/** Stops gracefully on SIGTERM or SIGINT, at once on a second one. */
export function stopOnSignal({ stop }: RunningServer): void {
  let signals = 0;
  const onSignal = async () => {
    signals++;
    if (signals > 1) process.exit(1);
    await stop();
    process.exit(0);
  };
  process.on("SIGTERM", onSignal).on("SIGINT", onSignal);
}

/** Ends the program: one line on stderr, exit code 1. */
export function fail(error: unknown): never {
  console.error(`error: ${reasonOf(error).replaceAll(/\s+/g, " ")}`);
  process.exit(1);
}

/** Ends the program if this Bun is too old for it. */
export function requireBunVersion(): void {
  const wanted = "1.4.5";
  const isOld = Bun.semver.order(Bun.version, wanted) < 0;
  if (isOld) fail(`This needs Bun ${wanted} or later; this is ${Bun.version}.`);
}

/** Where log lines go, as Bun's FileSink takes them: a promise says that a line has to wait. */
export interface LogSink {
  write(line: string): unknown;
  flush(): unknown;
}

// A process has one standard output, and two writers would mix their lines.
let standardOutput: LogSink | undefined;
const maxWaitingCharacters = 1_048_576;

/** Lines of JSON. What a slow reader leaves waiting is bounded; beyond that, lines are counted. */
export class Log {
  readonly #sink: LogSink | undefined;
  #waitingCharacters = 0;
  #dropped = 0;

  constructor(to: "stdout" | "off" | LogSink) {
    if (to === "stdout") this.#sink = standardOutput ??= Bun.stdout.writer();
    else if (to !== "off") this.#sink = to;
  }

  /** Writes one line. Whoever calls bounds what comes from a request. */
  write(event: string, details: Record<string, unknown>): void {
    if (!this.#sink) return;
    if (this.#waitingCharacters > maxWaitingCharacters) {
      this.#dropped++;
      return;
    }
    const dropped = this.#dropped > 0 ? { dropped: this.#dropped } : {};
    this.#dropped = 0;
    const entry = { time: new Date().toISOString(), event, ...details, ...dropped };
    // JSON leaves characters as they are that end a line or move a cursor somewhere.
    const line = `${JSON.stringify(entry).replace(/[\x7f-\x9f\u2000-\u206f]/g, "?")}\n`;
    const written = this.#sink.write(line);
    if (written instanceof Promise) void this.#countWhileWaiting(written, line.length);
  }

  async #countWhileWaiting(written: Promise<unknown>, characters: number): Promise<void> {
    this.#waitingCharacters += characters;
    await written.catch(() => {}); // a closed stdout ends no server
    this.#waitingCharacters -= characters;
  }

  /** Waits until what was written has arrived, but no longer than a second. */
  async flush(): Promise<void> {
    const flushed = Promise.resolve(this.#sink?.flush()).catch(() => {});
    await Promise.race([flushed, Bun.sleep(1_000)]);
  }
}

if (import.meta.main) requireBunVersion();
