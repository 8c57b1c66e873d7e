// Browsers start no worker from file://, so the search runs in a hidden frame there
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #frame = document.createElement("iframe");
    #waiting = [];
    #ready = false;

    constructor(url) {
      super();
      this.#frame.hidden = true;
      document.documentElement.append(this.#frame);
      const inside = this.#frame.contentWindow;
      const said = (data) => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        this.onmessage?.(event);
      };
      inside.postMessage = (data) => said(structuredClone(data));
      inside.importScripts = (...urls) => Promise.all(urls.map((each) => this.#load(each)));
      this.#load(url).then(() => {
        this.#ready = true;
        this.#waiting.splice(0).forEach((data) => this.postMessage(data));
      });
    }

    #load(url) {
      const script = this.#frame.contentDocument.createElement("script");
      script.src = new URL(url, location.href).href;
      const loaded = new Promise((resolve, reject) => {
        script.onload = resolve;
        script.onerror = reject;
      });
      this.#frame.contentDocument.body.append(script);
      return loaded;
    }

    postMessage(data) {
      if (!this.#ready) {
        this.#waiting.push(data);
        return;
      }
      const inside = this.#frame.contentWindow;
      const event = new inside.MessageEvent("message", { data: structuredClone(data) });
      inside.dispatchEvent(event);
      inside.onmessage?.(event);
    }

    terminate() {
      this.#frame.remove();
    }
  };
}
