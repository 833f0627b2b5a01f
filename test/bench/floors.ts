/**
 * The floors that the bench compares with: servers that do the least that such a server must, with
 * jose where ours use jose, and check nothing else.
 *
 *   bun floors.ts a   answers "hi"
 *   bun floors.ts b   reads the POST, signs a fixed claims set, answers that
 *   bun floors.ts c   verifies the presented token, answers "ok"
 *   bun floors.ts d   reads the POST, verifies the client assertion in it, signs as (b)
 *   bun floors.ts e   reads the POST, verifies its DPoP proof under the key in it, takes the
 *                     thumbprint of that key, signs as (b)
 *
 * (c) and (d) find the public JWK that they verify with in the variable KEY.
 */

import type * as Jose from "jose";

type Handler = (request: Request) => Response | Promise<Response>;

/** The floors that use jose. */
async function withJose(jose: typeof Jose): Promise<Record<string, Handler>> {
  const presented = JSON.parse(process.env["KEY"] ?? "null");
  const verificationKey = presented && (await jose.importJWK(presented, "ES256"));
  const { privateKey, publicKey } = await jose.generateKeyPair("ES256");
  const kid = await jose.calculateJwkThumbprint(publicKey);
  const iat = Math.floor(Date.now() / 1000);
  const times = { iat, nbf: iat, exp: iat + 3600, jti: crypto.randomUUID() };
  const parties = { iss: "http://127.0.0.1:5001", aud: "http://127.0.0.1:6001", sub: "client" };
  const claims = { ...parties, client_id: "client", scope: "api1", ...times };
  const answerToken = async () => {
    const jwt = new jose.SignJWT(claims).setProtectedHeader({ alg: "ES256", kid, typ: "at+jwt" });
    return new Response(await jwt.sign(privateKey));
  };
  return {
    b: async (request) => await request.text().then(answerToken),
    c: async (request) => {
      const accessToken = request.headers.get("authorization")?.slice("Bearer ".length) ?? "";
      await jose.jwtVerify(accessToken, verificationKey);
      return new Response("ok");
    },
    d: async (request) => {
      const form = new URLSearchParams(await request.text());
      await jose.jwtVerify(form.get("client_assertion") ?? "", verificationKey);
      return await answerToken();
    },
    e: async (request) => {
      await request.text();
      const proof = request.headers.get("dpop") ?? "";
      const { protectedHeader } = await jose.jwtVerify(proof, jose.EmbeddedJWK);
      await jose.calculateJwkThumbprint(protectedHeader.jwk!);
      return await answerToken();
    },
  };
}

const floor = process.argv[2] ?? "";
// (a) loads no jose: it is the floor of the start, too.
const fetch =
  floor === "a" ? () => new Response("hi") : (await withJose(await import("jose")))[floor]!;
const server = Bun.serve({ hostname: "127.0.0.1", port: 0, development: false, fetch });
console.error(`floor (${floor}): ${server.url.origin}`);
