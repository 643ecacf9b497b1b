// The token that some servers ask for: asked once for all who need it, kept for this tab only.

const KEY = "coatnet-token";
const dialog = document.getElementById("access");
const detail = document.getElementById("access-detail");
const input = document.getElementById("token");
let asking = null;

export function token() {
  return sessionStorage.getItem(KEY);
}

/** Another token than the one that was refused: true if there is one to try, false if the person has none. */
export async function renewToken(refused) {
  if (token() !== refused) return true; // somebody else asked meanwhile
  asking ??= askPerson(refused).finally(() => (asking = null));
  return asking;
}

function askPerson(refused) {
  detail.textContent = refused ? "The last one was not accepted." : "It is kept for this tab only.";
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const given = dialog.returnValue === "use";
        if (given) sessionStorage.setItem(KEY, input.value);
        input.value = "";
        resolve(given);
      },
      { once: true },
    );
  });
}
