// One request to the API, and its answer as it comes.

export class ApiError extends Error {}

export async function getJson(path, token) {
  const answer = await fetch(path, { headers: headersFor(token) });
  if (!answer.ok) throw new ApiError(await problemOf(answer));
  return answer.json();
}

// Yields the objects of a stream of server-sent events. Aborting the signal closes the connection, which ends the
// request at the server.
export async function* chunksOf(path, body, token, signal) {
  const headers = { "content-type": "application/json", ...headersFor(token) };
  const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!answer.ok) throw new ApiError(await problemOf(answer));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError("the stream ended before the answer did");
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const item = JSON.parse(data);
      if (item.error) throw new ApiError(item.error.message);
      yield item;
    }
  }
}

function headersFor(token) {
  return token ? { authorization: `Bearer ${token}` } : {};
}

async function problemOf(answer) {
  try {
    return `${answer.status}: ${(await answer.json()).error.message}`;
  } catch {
    return `${answer.status} ${answer.statusText}`;
  }
}
