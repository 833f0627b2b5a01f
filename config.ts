/**
 * What the three parties are told: addresses, scopes, registered clients, lifetimes.
 *
 * The first part is data, one literal for each party, and the only place that reads the
 * environment. The second part is plumbing that all programs share; on a first reading you can skip
 * it. On three machines each party has a copy of this file, with its own literal filled in.
 */

import { X509Certificate, createPrivateKey } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { link } from "node:fs/promises";
import { dirname } from "node:path";
import { getCACertificates } from "node:tls";
import * as jose from "jose";

// --- Settings ------------------------------------------------------------------------------------

/** A registered client: RFC 7591 §2, RFC 9449 §5.2, and names of our own. */
export interface ClientRegistration {
  client_id: string;
  /** SHA-256 in base64, several while a secret is changed; `expires_at` in seconds since 1970. */
  client_secrets?: { sha256: string; expires_at?: number }[];
  /**
   * Public keys, for `private_key_jwt`: the keys themselves, or where the client publishes them.
   */
  jwks?: { keys: jose.JWK[] };
  jwks_uri?: string;
  /** The only algorithm that the client's assertions may use; without it any accepted one. */
  token_endpoint_auth_signing_alg?: string;
  grant_types: string[];
  /** Scopes that the client may have, separated by spaces. */
  scope: string;
  access_token_lifetime_seconds: number;
  dpop_bound_access_tokens?: boolean;
  /** Extra claims for this client's tokens. A name that this server sets itself is refused. */
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
  /** How long a server that stops still answers, with Connection: close, so that callers leave. */
  drainSeconds: 0.5,
  log: (env["LOG"] === "off" ? "off" : "stdout") as "stdout" | "off" | LogSink,
  /** Milliseconds since 1970. A test can pass another clock. */
  clock: () => Date.now(),
};

/** Signature algorithms that are accepted from others: only asymmetric ones. */
const acceptedAlgorithms = [
  ...["ES256", "ES384", "ES512", "RS256", "RS384", "RS512"],
  ...["PS256", "PS384", "PS512", "EdDSA", "Ed25519"],
  ...["ML-DSA-44", "ML-DSA-65", "ML-DSA-87"],
];

export const authorizationServer = {
  issuer,
  /** Where to listen in plain http, as host:port, when a proxy in front ends TLS. */
  listen: env["ISSUER_LISTEN"],
  /**
   * Each scope belongs to one API, whose identifier becomes the `aud` of its tokens. The
   * description is for the readers of this file.
   */
  scopes: [{ scope: apiScope, description: "My API", resource }],
  clients: [
    {
      client_id: "client",
      client_secrets: [{ sha256: "K7gNU3sdo+OL0wNhqoVWhr3g6s1xYv72ol/pe/Unols=" }], // "secret"
      grant_types: ["client_credentials"],
      scope: apiScope,
      access_token_lifetime_seconds: 3600,
    },
    // `satisfies` checks the fields; `as` allows a test other clients, with other fields.
  ] satisfies ClientRegistration[] as ClientRegistration[],
  acceptedAlgorithms,
  signingKeys: {
    /** The first one signs; the keys of all are published. */
    algorithms: ["ES256"],
    rotationSeconds: 90 * 86_400,
    /** How long a key stays published after it signed last. */
    retentionSeconds: 14 * 86_400,
    /** How often an instance reads its database. */
    pollSeconds: 10,
    /** How long a cache may keep the published keys. */
    maxAgeSeconds: 60,
    /** How often an API fetches the keys of the issuer, and the issuer those of a `jwks_uri`. */
    refreshSeconds: 300,
    /** After a fetch, how long either waits before an unknown key may cause another. */
    coolDownSeconds: 5,
  },
  databaseUrl: env["DATABASE_URL"] || "sqlite://keys/keys.db",
  /** How long a start waits for a database that does not answer yet. */
  databaseWaitSeconds: 30,
  /**
   * A list of secrets, each of 32 bytes in base64url, separated by commas. The first seals, all
   * open; the word `none` among them allows keys that are not sealed.
   */
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
  refreshSeconds: authorizationServer.signingKeys.refreshSeconds,
  coolDownSeconds: authorizationServer.signingKeys.coolDownSeconds,
  /** How long the last known keys are used while the issuer cannot be reached. */
  keepKeysSeconds: 86_400,
  /** How many used DPoP proofs are remembered, for all clients together. */
  maxUsedProofs: 50_000,
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
  dpop: Boolean(env["DPOP"]) && env["DPOP"] !== "0",
  tls,
  /** For the renewal of tokens alone; assertions and proofs carry the time of the machine. */
  clock: () => Date.now(),
  /** The first proxy variable that is set, for a hint when a connection fails. */
  proxyVariable: ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"].find((name) => env[name]),
};

export type AuthorizationServerSettings = typeof authorizationServer;
export type ResourceServerSettings = typeof resourceServer;
export type ClientSettings = typeof client;
type TlsFiles = typeof tls;

// --- Plumbing (a first reader can stop here): what all share -------------------------------------

/** How far the clocks of two machines may differ. */
export const leewaySeconds = 30;
/** How old a DPoP proof may be (RFC 9449 §11.1). */
export const proofMaxAgeSeconds = 90;
/** The parameters of a private or symmetric key (RFC 7518 §6, RFC 8037 §2, ML-DSA). */
export const privateMembers = ["d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"];
/** For answers that no cache may keep; RFC 6749 §5.1 asks for both fields. */
export const noStore = { "cache-control": "no-store", pragma: "no-cache" };

/** Whether a value is a string that is not empty. */
export const isText = (value: unknown): value is string =>
  typeof value === "string" && value !== "";

export const secondsAt = (clock: () => number) => Math.floor(clock() / 1000);

/** SHA-256 of a text in UTF-8. */
export const sha256 = (text: string, encoding: "base64" | "base64url"): string =>
  Bun.SHA256.hash(text, encoding);

export type Members = Record<string, unknown>;

/**
 * Why a request is turned away. The code names a row in the server's own table of errors. The
 * reason and the details are for its log; the caller sees of them `details.scope` alone.
 */
export class Refusal<Code extends string = string> extends Error {
  readonly code: Code;
  readonly details: Members;

  constructor(code: Code, reason: string, details: Members = {}) {
    super(reason.slice(0, 2_000)); // it may quote a request
    this.code = code;
    this.details = details;
  }
}

/** For `.catch`: turns what jose or a decoder threw into a refusal with this code. */
export function refuseAs<Code extends string>(code: Code, thing: string, details?: Members) {
  return (error: unknown): never => {
    if (error instanceof Refusal) throw error;
    throw new Refusal(code, `${thing} is not valid: ${reasonOf(error)}.`, details);
  };
}

/** An error in one sentence for the log. jose says which claim is wrong; this adds its value. */
export function reasonOf(error: unknown): string {
  const { JWTClaimValidationFailed, JWTExpired } = jose.errors;
  if (!(error instanceof JWTClaimValidationFailed || error instanceof JWTExpired))
    return String(error instanceof Error ? error.message : error).slice(0, 2_000);
  const value = JSON.stringify(error.payload[error.claim]);
  return value ? `${error.message}; it is ${value.slice(0, 200)}` : error.message;
}

type JwtSettings = Pick<ResourceServerSettings, "acceptedAlgorithms" | "clock">;

/** What jose checks of every JWT from outside. */
export const jwtRules = ({ acceptedAlgorithms, clock }: JwtSettings) => ({
  algorithms: acceptedAlgorithms,
  clockTolerance: leewaySeconds,
  currentDate: new Date(clock()),
});

/** RFC 7515 §4.1.11: what is critical must be understood. jose would accept b64. */
const noCrit = "The JWT has a crit header, and no extension is known here";

/**
 * Whether a JWK is a public key of a kind that signs, with texts where they belong. An RSA key has
 * at most 4096 bits, for a longer one takes much of our time.
 */
function isUsable(jwk: unknown): boolean {
  const { kty, crv, x, y, n = "", e, pub } = Object(jwk) as jose.JWK;
  const areTexts = [kty, crv, x, y, n, e, pub].every((text = "") => typeof text === "string");
  return areTexts && n.length <= 700 && ["EC", "RSA", "OKP", "AKP"].includes(kty ?? "");
}

/**
 * The key that a DPoP proof shows, for jose (RFC 9449 §4.3). Throws for a private one (7), of which
 * jose lets RSA keys with p and q pass.
 */
export const proofKey: jose.JWTVerifyGetKey = async (header, jws) => {
  const { crit, jwk = {} } = header;
  if (crit) throw new Error(noCrit);
  if (privateMembers.some((name) => name in jwk)) throw new Error("The jwk is a private key");
  if (!isUsable(jwk)) throw new Error("The jwk is malformed, or has over 4096 bits");
  return await jose.EmbeddedJWK(header, jws);
};

/** What jose checks of a DPoP proof besides (RFC 9449 §4.3). jose adds the leeway. */
export const proofRules = { typ: "dpop+jwt", maxTokenAge: proofMaxAgeSeconds - leewaySeconds };

// --- Plumbing: addresses and TLS -----------------------------------------------------------------

/** Whether a URL names this machine. */
export const isLoopback = (url: URL) => /^(localhost|127(\.\d+){3}|\[::1\])$/.test(url.hostname);

export const withoutSlash = (text: string) => text.replace(/\/$/, "");

/**
 * The URL of an issuer or of an API: https, or http on a loopback host; a path is allowed, a query,
 * a fragment and credentials are not. That of another party may end in a slash. Throws an Error
 * that says what to write; it repeats no password.
 */
export function parseServerUrl(setting: string, value: string, whose: "own" | "other"): URL {
  const url = URL.parse(value);
  const isSafe = url?.protocol === "https:" || (url?.protocol === "http:" && isLoopback(url));
  if (!url || !isSafe) throw new Error(`${setting} must be https, or http on a loopback host.`);
  const plain = withoutSlash(`${url.origin}${url.pathname}`);
  if (value === plain || (whose === "other" && value === `${plain}/`)) return url;
  throw new Error(`${setting} must be a host and a path alone. Write ${plain}.`);
}

/** A well-known URI, which stands between host and path (RFC 8414 §3.1, RFC 9728 §3.1). */
export function wellKnownUrl(url: string, name: string): string {
  const { origin, pathname } = new URL(url);
  return `${origin}/.well-known/${name}${withoutSlash(pathname)}`;
}

/** Where OpenID Connect Discovery §4 puts the metadata of an issuer: behind its path. */
export const metadataUrl = (issuer: string) =>
  `${withoutSlash(issuer)}/.well-known/openid-configuration`;

type ListenSettings = Pick<ResourceServerSettings, "listen" | "reusePort" | "tls">;

/** Options for Bun.serve: listen at `url`, or in plain http at the host:port of `listen`. */
export async function listenOptions(name: "ISSUER" | "API", url: URL, settings: ListenSettings) {
  const { listen, reusePort, tls: files } = settings;
  const address = listen ? URL.parse(`http://${listen}`) : url;
  if (!address || (listen && !/^[^/?#@\\]+:\d+$/.test(listen)))
    throw new Error(`${name}_LISTEN must be host:port, for example 127.0.0.1:8080.`);
  // A loopback server accepts weak secrets and plain http, so no network may reach it.
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
  const remedy = "TLS_CERT and TLS_KEY must name a certificate and its key, in PEM.";
  const { cert, key } = isDevelopment
    ? await developmentPair(files.developmentFile)
    : readPair(files.certificateFile, files.keyFile, remedy);
  // RFC 9325 §4.2: TLS 1.2 only with forward secrecy and AEAD; TLS 1.3 has nothing else.
  return { ...options, tls: { cert, key, ciphers: "ECDHE+AESGCM:ECDHE+CHACHA20" } };
}

/** A certificate and its key, in PEM. Throws an Error with the remedy unless they are a pair. */
function readPair(certificateFile = "", keyFile = "", remedy: string) {
  try {
    const [cert, key] = [readFileSync(certificateFile, "utf8"), readFileSync(keyFile, "utf8")];
    const certificate = new X509Certificate(cert);
    if (certificate.checkPrivateKey(createPrivateKey(key))) return { cert, key, certificate };
  } catch {
    // What OpenSSL says of a damaged file helps nobody.
  }
  throw new Error(remedy);
}

/** The development certificate, made where it is missing or of no use any longer. */
async function developmentPair(file: string) {
  const read = () =>
    readPair(file, file, `${file} is damaged or unreadable. Delete it: a start makes a new one.`);
  const isUnfit = () => {
    const { certificate } = read();
    // One that is an authority could sign for other names.
    return certificate.ca || Date.parse(certificate.validTo) < Date.now();
  };
  if (!existsSync(file) || isUnfit()) {
    const draft = await makeCertificate(file);
    // Asked again, for another program may have put its own there while openssl ran.
    if (existsSync(file) && isUnfit()) rmSync(file);
    // link() never overwrites: if another program has put its certificate there, that one stays.
    await link(draft, file).catch(() => {});
    rmSync(draft);
  }
  return read();
}

/** Makes a key and a certificate for the servers of this machine alone: it is no authority. */
async function makeCertificate(file: string): Promise<string> {
  mkdirSync(dirname(file), { recursive: true, mode: 0o700 });
  const draft = `${file}.${crypto.randomUUID()}`;
  writeFileSync(draft, "", { mode: 0o600 });
  const making = Bun.$`openssl req -x509 -nodes -days 825 -newkey ec \
    -pkeyopt ec_paramgen_curve:P-256 -subj /CN=localhost \
    -addext subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1 \
    -addext basicConstraints=critical,CA:FALSE -addext keyUsage=critical,digitalSignature \
    -addext extendedKeyUsage=serverAuth -keyout ${draft} -out ${draft}`;
  const { exitCode } = await making.nothrow().quiet();
  if (exitCode === 0) return draft;
  rmSync(draft);
  const ways = "install it, set TLS_CERT and TLS_KEY, or use http on a loopback host";
  throw new Error(`The program openssl is missing or failed: ${ways}.`);
}

// --- Plumbing: requests to other servers ---------------------------------------------------------

/**
 * A fetch that never follows a redirect, for Bun would send the body and the proof to another host.
 * A loopback host is reached directly, for a proxy would read the secret, and the certificate of
 * our own servers is trusted there.
 */
export async function fetchUnredirected(url: string, init: BunFetchRequestInit, files: TlsFiles) {
  if (!isLoopback(new URL(url))) return await fetch(url, { ...init, redirect: "manual" });
  const file = files.certificateFile || files.developmentFile;
  const own = existsSync(file) ? [readFileSync(file, "utf8")] : [];
  const tls = { ca: [...own, ...getCACertificates()] };
  return await fetch(url, { ...init, redirect: "manual", proxy: false, tls });
}

const maxAnswerBytes = 1_048_576;

/** Such a fetch for a short answer: metadata, keys, a token. Rejects for a longer one. */
export async function boundedFetch(url: string, init: BunFetchRequestInit, files: TlsFiles) {
  // Unpacking would go past the bound before the first chunk is seen.
  const response = await fetchUnredirected(url, { ...init, decompress: false }, files);
  const chunks: Uint8Array[] = [];
  let bytes = 0;
  for await (const chunk of response.body ?? []) {
    bytes += chunk.byteLength;
    if (bytes > maxAnswerBytes) throw new Error(`The answer is over ${maxAnswerBytes} bytes long.`);
    chunks.push(chunk);
  }
  return new Response(bytes > 0 ? Buffer.concat(chunks) : null, response);
}

/** The members of the JSON object that a GET answers. Rejects unless the answer is 200 and JSON. */
export async function fetchJson(url: string, signal: AbortSignal, files: TlsFiles) {
  parseServerUrl("The address", URL.parse(url)?.href.split("?")[0] ?? "", "other");
  const response = await boundedFetch(url, { signal }, files);
  if (response.status !== 200) throw new Error(`Status ${response.status} came from ${url}.`);
  return Object(await response.json()) as Members;
}

/**
 * The keys of a JWK Set (RFC 7517 §5). What is no key that we could use is ignored. An empty set
 * is an answer, and withdraws all keys; one with nothing usable in it is a failure.
 */
export async function fetchJwkSet(url: string, signal: AbortSignal, files: TlsFiles) {
  const { keys } = await fetchJson(url, signal, files);
  const isList = Array.isArray(keys) && keys.length <= 100;
  if (!isList) throw new Error("The JWK Set has no list of keys, or one of over 100.");
  const usable: jose.JWK[] = keys.filter(isUsable);
  if (keys.length > 0 && usable.length === 0) throw new Error("The JWK Set has no usable key.");
  return usable;
}

interface KeyRules {
  fetchKeys: (signal: AbortSignal) => Promise<jose.JWK[]>;
  coolDownSeconds: number;
  /** From this age on, a use first tries to fetch new keys; if that fails, it takes these. */
  refetchAfterSeconds: number;
  /** Older keys are used no longer. */
  keepSeconds: number;
  clock: () => number;
}

/**
 * The public keys of another party (RFC 7517 §5), fetched when they are needed.
 * Choice: jose chooses the key for a JWT, but we fetch the keys, for its createRemoteJWKSet tries
 * again at once after a failure, and does not tell whether the set has changed.
 */
export class PublicKeys {
  /** The keys in use: another array if, and only if, the set has changed. */
  keys: jose.JWK[] = [];
  readonly #rules: KeyRules;
  #choose = jose.createLocalJWKSet({ keys: [] });
  #fetchedAt = -Infinity;
  #triedAt = -Infinity;
  #isTrying = false;
  #lastTry = Promise.resolve();

  constructor(rules: KeyRules) {
    this.#rules = rules;
  }

  /** A clock that was set back counts like time that passed. */
  #secondsSince(time: number): number {
    return Math.abs(this.#rules.clock() - time) / 1000;
  }

  get areUsable(): boolean {
    return this.#secondsSince(this.#fetchedAt) <= this.#rules.keepSeconds;
  }

  /** The key for a JWT, as jose asks for it. An unknown `kid` is a reason to fetch them again. */
  find: jose.JWTVerifyGetKey = async (header, jws) => {
    if (header.crit) throw new Error(noCrit);
    if (this.#secondsSince(this.#fetchedAt) > this.#rules.refetchAfterSeconds)
      await this.refresh().catch((error: unknown) => {
        if (!this.areUsable) throw error;
      });
    try {
      return await this.#choose(header, jws);
    } catch (error) {
      if (!(error instanceof jose.errors.JWKSNoMatchingKey)) throw error;
      await this.refresh();
      return await this.#choose(header, jws);
    }
  };

  /**
   * Fetches the keys, one fetch at a time. Within the cool-down the outcome of the last try counts.
   * Rejects with a refusal if they could not be fetched, which is not the fault of whoever sent the
   * JWT.
   */
  async refresh(): Promise<void> {
    const isCoolDownOver = this.#secondsSince(this.#triedAt) >= this.#rules.coolDownSeconds;
    const isDue = !this.#isTrying && isCoolDownOver;
    if (isDue) this.#lastTry = this.#tryOnce();
    await this.#lastTry;
  }

  async #tryOnce(): Promise<void> {
    const { fetchKeys, clock } = this.#rules;
    this.#isTrying = true;
    try {
      const keys = await fetchKeys(AbortSignal.timeout(5_000));
      if (!Bun.deepEquals(keys, this.keys)) {
        this.#choose = jose.createLocalJWKSet({ keys });
        this.keys = keys;
      }
      this.#fetchedAt = clock();
    } catch (error) {
      const reason = `The keys could not be fetched: ${reasonOf(error)}`;
      // Both servers have this code in their tables of errors.
      throw new Refusal("temporarily_unavailable", reason);
    } finally {
      this.#isTrying = false;
      this.#triedAt = clock();
    }
  }
}

// --- Plumbing: answering, stopping, logging ------------------------------------------------------

/** Logs what became of one request: its address and duration are added. */
export type RequestLog = (event: string, details: Members) => void;
export type Handler = (request: Request, log: RequestLog) => Response | Promise<Response>;

/** The path of a request. Its target need not be an absolute URL (HTTP/1.0, CONNECT). */
export const pathOf = (request: Request, base: string) => URL.parse(request.url, base)?.pathname;

export type Routes = Record<string, Handler>;

/**
 * Answers each request by the handler that stands at its method and path, as "GET /health" or
 * "POST /orders", below the path of `url`. HEAD follows GET. Elsewhere 404, and 405 for a path
 * that has other methods.
 */
export function router(url: string, routes: Routes): Handler {
  const base = withoutSlash(new URL(url).pathname);
  const handlers = new Map<string, Handler>();
  for (const [route, handler] of Object.entries(routes)) {
    const [method, path = ""] = route.split(" ");
    // RFC 8414 §3.1, RFC 9728 §3.1: these stand between host and path.
    const isBetween = path.startsWith("/.well-known/oauth-");
    handlers.set(`${method} ${isBetween ? path + base : base + path}`, handler);
  }
  return async (request, log) => {
    const path = pathOf(request, url);
    const method = request.method === "HEAD" ? "GET" : request.method;
    const handler = handlers.get(`${method} ${path}`);
    if (handler) return await handler(request, log);
    const known = ["GET", "POST", "PUT", "PATCH", "DELETE"];
    const allowed = known.filter((name) => handlers.has(`${name} ${path}`));
    if (allowed.length === 0) return new Response("Not Found", { status: 404, headers: noStore });
    // RFC 9110 §15.5.6: a 405 names the methods that the target has.
    const allow = allowed.join(", ").replace("GET", "GET, HEAD");
    return new Response("Method Not Allowed", { status: 405, headers: { ...noStore, allow } });
  };
}

/** Like Bun.sleep, but it keeps no process alive. */
const pause = (milliseconds: number) => new Promise((end) => setTimeout(end, milliseconds).unref());

/** Logs a refusal, and makes the answer of it. */
export type AnswerRefusal = (refusal: Refusal, log: RequestLog, request: Request) => Response;

/** The wrapper around every answer of a server, and how the server stops. */
export class Lifecycle {
  isStopping = false;
  readonly #log: Log;
  readonly #answerRefusal: AnswerRefusal;

  constructor(log: Log, answerRefusal: AnswerRefusal) {
    this.#log = log;
    this.#answerRefusal = answerRefusal;
  }

  /** Answers a refusal, makes any other failure a constant 500, and closes while stopping. */
  async answer(handler: Handler, request: Request, http: Bun.Server<undefined>) {
    const started = performance.now();
    const log: RequestLog = (event, details) => {
      const address = http.requestIP(request)?.address;
      const milliseconds = Math.round(performance.now() - started);
      this.#log.write(event, { address, ...details, milliseconds });
    };
    const response = await Promise.try(handler, request, log).catch((error: unknown) => {
      if (error instanceof Refusal) return this.#answerRefusal(error, log, request);
      const reason = String(error instanceof Error ? error.stack : error).slice(0, 2_000);
      log("failure", { reason });
      return new Response("Internal Server Error", { status: 500, headers: noStore });
    });
    if (this.isStopping) response.headers.set("connection", "close");
    return response;
  }

  /**
   * Lets callers come back elsewhere, then waits at most 5 s for answers that are under way.
   * Without the pause, a client that keeps its connection gets a reset on its next request.
   */
  async stop(http: Bun.Server<undefined>, drainSeconds: number): Promise<void> {
    this.isStopping = true;
    await Bun.sleep(drainSeconds * 1000);
    await Promise.race([http.stop(), pause(5_000)]);
    await http.stop(true);
    await this.#log.flush();
  }
}

/** The URL of a server: where it says port 0, the port that the system gave. */
export const urlOf = (url: string, { port }: Bun.Server<undefined>) =>
  url.replace(/^(\w+:\/\/[^/]+):0(?=\/|$)/, `$1:${port}`);

type Running = { url: string; stop: () => Promise<void> };

/**
 * Runs a server until SIGTERM or SIGINT, which stop it gracefully; a second one ends it at once.
 */
export async function runProgram(name: string, start: () => Promise<Running>) {
  requireBunVersion();
  let running: Running | undefined;
  let signals = 0;
  const onSignal = async () => {
    signals++;
    if (signals === 1) await running?.stop();
    process.exit(signals === 1 ? 0 : 1);
  };
  // Also while it starts: the first process of a container ignores signals that it does not handle.
  process.on("SIGTERM", onSignal).on("SIGINT", onSignal);
  running = await start().catch(fail);
  console.error(`${name}: ${running.url}`);
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

/** Where log lines go. When `write` returns a promise, the line has to wait for a slow reader. */
export type LogSink = { write(line: string): unknown; flush(): unknown };

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

  /** Writes one line. The caller shortens what comes from a request. */
  write(event: string, details: Members): void {
    if (this.#waitingCharacters > maxWaitingCharacters) {
      this.#dropped++;
      return;
    }
    const dropped = this.#dropped || undefined; // JSON leaves out what is undefined
    this.#dropped = 0;
    const entry = { time: new Date().toISOString(), event, ...details, dropped };
    // JSON does not escape all characters that end a line or move a cursor.
    const line = `${JSON.stringify(entry).replace(/[\x7f-\x9f\u2000-\u206f]/g, "?")}\n`;
    const written = this.#sink?.write(line);
    if (!(written instanceof Promise)) return;
    this.#waitingCharacters += line.length;
    const settle = () => (this.#waitingCharacters -= line.length);
    written.then(settle, settle); // a closed stdout ends no server
  }

  /** Waits until what was written has arrived, but no longer than a second. */
  async flush(): Promise<void> {
    const flushed = Promise.resolve(this.#sink?.flush()).catch(() => {});
    await Promise.race([flushed, pause(1_000)]);
  }
}

// `bun start` runs this file first, so that a Bun that is too old ends it with one line.
if (import.meta.main) requireBunVersion();
